# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: methods, where their tensors go, and the run."""

from offsite_ray.finetuning.methods import FINETUNING_METHODS
from offsite_ray.finetuning.module import finetuning_module
from offsite_ray.finetuning.run import FinetuneResult, FinetuneTask, finetune

__all__ = [
    "FINETUNING_METHODS",
    "FinetuneResult",
    "FinetuneTask",
    "finetune",
    "finetuning_module",
]
