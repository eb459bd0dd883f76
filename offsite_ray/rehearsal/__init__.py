# SPDX-License-Identifier: Apache-2.0
"""Rehearsals: a training step on tensors that have shapes and no memory, counted."""

from offsite_ray.rehearsal.ledger import Bytes, Operations
from offsite_ray.rehearsal.step import Rehearsal, empty_batch, rehearse

__all__ = [
    "Bytes",
    "Operations",
    "Rehearsal",
    "empty_batch",
    "rehearse",
]
