# SPDX-License-Identifier: Apache-2.0
"""Distillation: train the emulator blocks to stand in for the middle of the full model."""

from offsite_ray.distillation.losses import (
    DISTILLATION_LOSSES,
    DistillationLoss,
    last_stood_for,
    normalized_error,
)
from offsite_ray.distillation.module import DistillationModel, distillation_module
from offsite_ray.distillation.run import DistillResult, distill
from offsite_ray.distillation.task import DistillTask
from offsite_ray.distillation.teacher import fill_here

__all__ = [
    "DISTILLATION_LOSSES",
    "DistillResult",
    "DistillTask",
    "DistillationLoss",
    "DistillationModel",
    "distill",
    "distillation_module",
    "fill_here",
    "last_stood_for",
    "normalized_error",
]
