# SPDX-License-Identifier: Apache-2.0
"""The module that is trained: a language model of which some part trains, with its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.finetuning.methods import finetuning_method
from offsite_ray.training import LanguageModelLoss, enable_checkpointing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offsite_ray.architectures import Architecture
    from offsite_ray.config import FinetuneConfig


def finetuning_module(
    model: Any,
    arch: Architecture,
    indices: Sequence[int] | None,
    config: FinetuneConfig,
    *,
    use_positions: bool,
) -> LanguageModelLoss:
    """Return what is trained, from a model of transformers on any device, ``meta`` among them.

    Args:
        model: The emulator model or the full model. Changed.
        arch: Its architecture.
        indices: Blocks to train, as the model numbers them; None: everything, embeddings too.
        config: The method, its settings, and recomputation.
        use_positions: As :func:`~offsite_ray.training.keeps_documents_apart` says.
    """
    model.requires_grad_(indices is None)
    if indices is not None:
        # What a method draws is the same on every worker and after a resume.
        torch.manual_seed(config.seed)
        finetuning_method(config.method).prepare(model, arch, indices, config)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    return LanguageModelLoss(model, use_positions=use_positions)
