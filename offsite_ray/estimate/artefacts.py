# SPDX-License-Identifier: Apache-2.0
"""Bytes of what the loop writes, by counting what is in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.architectures import DTYPES, get_blocks
from offsite_ray.config import FinetuneConfig
from offsite_ray.distillation.cache import needed_ends
from offsite_ray.errors import ConfigError
from offsite_ray.finetuning import FINETUNING_METHODS, finetuning_module
from offsite_ray.training import LANGUAGE_MODEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from offsite_ray.config import DistillConfig
    from offsite_ray.estimate.shapes import Shapes

_STATE_BYTES = 3 * 4
"""A checkpoint has a trained parameter and AdamW's two moments of it in float32."""

_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Artefacts:
    """Bytes of tensors; manifests, configs and tokenizers come on top."""

    full_model: int
    emulator_bundle: int
    adapter_bundle: Mapping[str, int | None]
    """Fine-tuning method to bytes; None where the model has nothing that it could train."""
    distillation_checkpoint: int
    teacher_cache_per_token: int
    """The teacher's hidden states that the losses need, for one token."""


def artefacts_of(shapes: Shapes, distillation: DistillConfig, rank: int) -> Artefacts:
    """Return the bytes of the artefacts of a plan."""
    emulator = shapes.empty(shapes.emulator_config)
    blocks = get_blocks(emulator, shapes.arch)
    trained = [p for index in shapes.plan.emulator for p in _block(shapes, blocks, index)]
    return Artefacts(
        full_model=_stored_bytes(shapes, _saved(shapes.empty())),
        emulator_bundle=_stored_bytes(shapes, _saved(emulator)),
        adapter_bundle={name: _adapter_bytes(shapes, name, rank) for name in FINETUNING_METHODS},
        distillation_checkpoint=sum(p.numel() for p in trained) * _STATE_BYTES,
        teacher_cache_per_token=_cache_bytes(shapes, distillation),
    )


def count_parameters(model: Any) -> int:
    """Return the number of parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _block(shapes: Shapes, blocks: Any, index: int) -> list[Tensor]:
    return list(blocks[shapes.plan.kept.index(index)].parameters())


def _saved(model: Any) -> list[Tensor]:
    """Return what a checkpoint holds: parameters, tied ones once, and buffers that are saved."""
    names = model.state_dict().keys()
    buffers = [buffer for name, buffer in model.named_buffers() if name in names]
    return [*model.parameters(), *buffers]


def _stored_bytes(shapes: Shapes, tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors) * shapes.stored_dtype.itemsize


def _adapter_bytes(shapes: Shapes, method: str, rank: int) -> int | None:
    config = FinetuneConfig(bundle="-", data=("-",), out="-", method=method, rank=rank)
    model = shapes.empty(shapes.emulator_config)
    own = {f"{LANGUAGE_MODEL}{name}" for name, _ in model.named_parameters()}
    try:
        with torch.device("meta"):
            module = finetuning_module(
                model, shapes.arch, shapes.adapter_positions, config, use_positions=False
            )
    except ConfigError:  # nothing to train, as bitfit without a bias
        return None
    # What a method adds is saved in float32, the model's own in the full model's dtype.
    return sum(
        p.numel() * (shapes.stored_dtype.itemsize if name in own else _FLOAT32)
        for name, p in module.named_parameters()
        if p.requires_grad
    )


def _cache_bytes(shapes: Shapes, config: DistillConfig) -> int:
    hidden: int = shapes.config.get_text_config().hidden_size
    return len(needed_ends(shapes.plan, config)) * hidden * DTYPES[config.dtype].itemsize
