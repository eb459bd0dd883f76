# SPDX-License-Identifier: Apache-2.0
"""Estimates: bytes of artefacts, memory of GPUs and time of a plan, from shapes alone."""

from offsite_ray.estimate.dry_run import DryRun, dry_run
from offsite_ray.estimate.memory import Memory, Worker, memory_of
from offsite_ray.estimate.run import Cost, Estimate, Option, estimate
from offsite_ray.estimate.shapes import Shapes, Step, open_shapes
from offsite_ray.estimate.table import estimate_tables

__all__ = [
    "Cost",
    "DryRun",
    "Estimate",
    "Memory",
    "Option",
    "Shapes",
    "Step",
    "Worker",
    "dry_run",
    "estimate",
    "estimate_tables",
    "memory_of",
    "open_shapes",
]
