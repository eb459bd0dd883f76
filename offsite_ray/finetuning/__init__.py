# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: methods, where their tensors go, and the run."""

from offsite_ray.finetuning.run import FinetuneResult, FinetuneTask, finetune

__all__ = ["FinetuneResult", "FinetuneTask", "finetune"]
