# SPDX-License-Identifier: Apache-2.0
"""Training: the loop, its engine in this process, checkpoints. Ray and DeepSpeed are elsewhere."""

from offsite_ray.results import Report
from offsite_ray.training.engine import TorchEngine, adamw, parameter_groups, run_here
from offsite_ray.training.loop import training_loop
from offsite_ray.training.modules import (
    LANGUAGE_MODEL,
    LanguageModelLoss,
    enable_checkpointing,
    keeps_documents_apart,
    loaded_dtype,
    set_dtypes,
)
from offsite_ray.training.protocols import Engine, Fit, TrainingOutcome, TrainingTask
from offsite_ray.training.runs import check_out, run_directory

__all__ = [
    "LANGUAGE_MODEL",
    "Engine",
    "Fit",
    "LanguageModelLoss",
    "Report",
    "TorchEngine",
    "TrainingOutcome",
    "TrainingTask",
    "adamw",
    "check_out",
    "enable_checkpointing",
    "keeps_documents_apart",
    "loaded_dtype",
    "parameter_groups",
    "run_directory",
    "run_here",
    "set_dtypes",
    "training_loop",
]
