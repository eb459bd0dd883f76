# SPDX-License-Identifier: Apache-2.0
"""Making a transformers model ready to train, and asking what its attention can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.architectures.surgery import block_model, one_of_each_kind
from offsite_ray.training.batches import sum_cross_entropy

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.configuration_utils import PretrainedConfig

    from offsite_ray.architectures import Architecture
    from offsite_ray.bundle import TensorDirectory

LANGUAGE_MODEL = "language_model."
"""Prefix of the model's own names in a module that computes its loss."""


class LanguageModelLoss(torch.nn.Module):
    """A causal language model that returns its summed cross-entropy as the part ``lm``."""

    def __init__(self, language_model: Any, *, use_positions: bool) -> None:
        """Wrap a transformers model; ``use_positions`` as :func:`keeps_documents_apart` says."""
        super().__init__()
        self.language_model = language_model
        self._use_positions = use_positions

    def forward(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return ``{"lm": loss}``, summed over the target tokens of ``(B, T)``."""
        positions = {}
        if self._use_positions and position_ids is not None:
            positions["position_ids"] = position_ids
        logits = self.language_model(input_ids=input_ids, use_cache=False, **positions).logits
        return {"lm": sum_cross_entropy(logits, labels)}


def loaded_dtype(compute: torch.dtype) -> torch.dtype | None:
    """Return the dtype to load a model in; None: as it is stored.

    Half precision is only for the arithmetic: what trains gets its float32 from what is stored.
    """
    return None if compute is torch.bfloat16 else compute


def set_dtypes(module: torch.nn.Module, frozen: torch.dtype) -> None:
    """Make what trains float32 and the rest ``frozen``; ZeRO-3 has its own way and is left.

    A frozen vector beside a trained one (the scale of a norm whose bias trains) is float32 too:
    norms take no mixture.
    """
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        trains = any(parameter.requires_grad for parameter in own)
        for parameter in own:
            if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
                keep = parameter.requires_grad or (trains and parameter.ndim == 1)
                parameter.data = parameter.data.to(torch.float32 if keep else frozen)


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass of a transformers model."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Only reentrant recomputation needs gradients from the embeddings on, which it enables.
    model.disable_input_require_grads()
    model.train()  # transformers only recomputes in training mode; there is no dropout to wake


def keeps_documents_apart(
    config: PretrainedConfig, arch: Architecture, weights: TensorDirectory
) -> bool:
    """Return whether positions that begin anew keep packed documents apart in this model.

    Asked of the first block of each kind: two documents in one row must give the second the hidden
    states that it has on its own.
    """
    indices = one_of_each_kind(config)
    names = [name for name in weights.tensors if arch.block_of(name) in indices]
    model = block_model(config, arch, indices, {name: weights.read(name) for name in names})
    model.float().eval()  # so that a leak cannot pass for rounding
    vocab = model.config.get_text_config().vocab_size
    tokens = (torch.arange(1, 13) * 5 % vocab)[None]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    try:
        with torch.no_grad():
            packed = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, 5:]
            alone = model(input_ids=tokens[:, 5:], use_cache=False).logits
    except TypeError:  # a model without position_ids
        return False
    return float((packed - alone).abs().max()) <= 1e-4 * float(alone.abs().max())
