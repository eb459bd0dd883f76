# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning methods: what trains inside the adapter blocks. One row per method.

A row prepares a model for training, saves what was trained under the names of the full model, and
says which tensors of a model it replaces. The same three steps serve the adapter bundle and the
baseline that trains the full model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from offsite_ray.architectures import Architecture, disk_state, get_blocks, parameter_names
from offsite_ray.architectures.bottleneck import BOTTLENECK_NAME, attach_bottlenecks
from offsite_ray.bundle import (
    TORCH_DTYPES,
    TensorDirectory,
    all_finite,
    lazy_spec,
    specs,
    write_file,
)
from offsite_ray.emulator import rounded
from offsite_ray.errors import ConfigError, PlugInError, unknown_name
from offsite_ray.finetuning.lora import lora_replacements, prepare_lora, save_lora

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from offsite_ray.config import FinetuneConfig
    from offsite_ray.finetuning.host import Host

ADAPTER_FILE = "adapter.safetensors"
"""Trained tensors under their names in the full model."""

_BIAS = re.compile(r".*[._]bias")

Replacements = dict[str, Callable[[], "Tensor"]]
"""Name on disk in a model to what returns its new tensor, in the stored dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuningMethod:
    """What trains, how it is saved, and what it replaces."""

    name: str
    prepare: Callable[[PreTrainedModel, Architecture, Sequence[int], FinetuneConfig], None]
    """Sets ``requires_grad`` in the blocks of a frozen model, adding modules where needed."""
    save: Callable[[Path, Mapping[str, Tensor], Host, FinetuneConfig], dict[str, str]]
    """Writes trained tensors, given by name in memory; returns file name to digest."""
    replacements: Callable[[Path, TensorDirectory, Host], Replacements] | None
    """Tensors of the host that a saved adapter replaces; None where it cannot be merged."""


def trained_blocks(only: re.Pattern[str] | None = None) -> Callable[..., None]:
    """Return the ``prepare`` that trains the blocks' own parameters (whose name matches)."""

    def prepare(
        model: PreTrainedModel, arch: Architecture, indices: Sequence[int], _: FinetuneConfig
    ) -> None:
        blocks = get_blocks(model, arch)
        for index in indices:
            for name, parameter in blocks[index].named_parameters():
                parameter.requires_grad_(only is None or only.fullmatch(name) is not None)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                f"no block of this {model.config.model_type} has a bias, so bitfit has nothing to "
                "train; use --method lora or full"
            )

    return prepare


def save_tensors(
    directory: Path, state: Mapping[str, Tensor], host: Host, _: FinetuneConfig
) -> dict[str, str]:
    """Write the blocks' own parameters in the host's stored dtypes."""
    disk = disk_state(host.config, host.arch, state, host.weights.tensors)
    stored = [
        lazy_spec(host.full_name(name), dtype, tensor.shape, rounded(name, tensor, dtype))
        for name, tensor in disk.items()
        for dtype in (host.weights.tensors[name].dtype,)
    ]
    stored.sort(key=lambda spec: spec.name)
    return {ADAPTER_FILE: write_file(directory / ADAPTER_FILE, stored)}


def tensor_replacements(only: re.Pattern[str] | None = None) -> Callable[..., Replacements]:
    """Return the ``replacements`` of tensors that are saved whole (those whose name matches)."""

    def replacements(path: Path, saved: TensorDirectory, host: Host) -> Replacements:
        trainable = parameter_names(host.config, host.arch, host.weights.tensors)
        expected = {
            name: host.weights.tensors[name]
            for name in host.block_names
            if name in trainable and (only is None or only.fullmatch(name))
        }
        by_name = {host.own_name(name): info for name, info in saved.tensors.items()}
        if missing := sorted(set(expected) - set(by_name)):
            raise PlugInError(f"{path} lacks tensor {host.full_name(missing[0])!r}")
        for name, info in by_name.items():
            full_name = host.full_name(name)
            if name not in expected:
                raise PlugInError(f"{path} holds tensor {full_name!r}, which may not be replaced")
            if info.layout != expected[name].layout:
                raise PlugInError(
                    f"{path}: tensor {full_name!r} is {info.dtype} {list(info.shape)} where the "
                    f"model has {expected[name].dtype} {list(expected[name].shape)}"
                )
            check_finite(path, full_name, saved.view(full_name))
        return {
            name: lambda saved_name=info.name: saved.view(saved_name)  # type: ignore[misc]
            for name, info in by_name.items()
        }

    return replacements


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse a tensor with a value that is not a number, or infinite."""
    if not all_finite(tensor):
        raise PlugInError(f"{path}: tensor {name!r} holds values that are not finite")


def prepare_bottleneck(
    model: PreTrainedModel, arch: Architecture, indices: Sequence[int], config: FinetuneConfig
) -> None:
    """Put a fresh bottleneck after each block; only these train."""
    attach_bottlenecks(model, arch, indices, config.rank)


def save_bottleneck(
    directory: Path, state: Mapping[str, Tensor], host: Host, _: FinetuneConfig
) -> dict[str, str]:
    """Write the bottlenecks in float32, under absolute names."""
    tensors = {host.full_name(name): tensor.float() for name, tensor in state.items()}
    return {ADAPTER_FILE: write_file(directory / ADAPTER_FILE, specs(tensors))}


def bottleneck_tensors(path: Path, saved: TensorDirectory, host: Host) -> dict[str, Tensor]:
    """Return saved bottlenecks by their names in the host, checked.

    Raises:
        PlugInError: One is missing, too many, of the wrong shape or dtype, or not finite.
    """
    hidden = host.config.hidden_size
    parts = {"down.weight", "down.bias", "up.weight", "up.bias"}
    expected = {
        host.full_name(f"{host.arch.family.blocks}.{index}.{BOTTLENECK_NAME}.{part}")
        for index in host.positions.values()
        for part in parts
    }
    if odd := sorted(expected ^ set(saved.tensors)):
        state = "lacks" if odd[0] in expected else "holds"
        raise PlugInError(f"{path} {state} tensor {odd[0]!r}, unlike a bottleneck adapter here")
    downs = [info for name, info in saved.tensors.items() if name.endswith("down.weight")]
    rank = max((info.shape[0] for info in downs if info.shape), default=0)
    shapes = {
        "down.weight": (rank, hidden),
        "down.bias": (rank,),
        "up.weight": (hidden, rank),
        "up.bias": (hidden,),
    }
    for name, info in saved.tensors.items():
        shape = shapes[name.rsplit(f"{BOTTLENECK_NAME}.", 1)[1]]
        if TORCH_DTYPES[info.dtype] != torch.float32 or info.shape != shape:
            raise PlugInError(
                f"{path}: tensor {name!r} is {info.dtype} {list(info.shape)}, not F32 {list(shape)}"
            )
        check_finite(path, name, saved.read(name))
    return {host.own_name(name): saved.read(name) for name in saved.tensors}


_ROWS = (
    FinetuningMethod(
        name="full",
        prepare=trained_blocks(),
        save=save_tensors,
        replacements=tensor_replacements(),
    ),
    FinetuningMethod(
        name="bitfit",
        prepare=trained_blocks(_BIAS),
        save=save_tensors,
        replacements=tensor_replacements(_BIAS),
    ),
    FinetuningMethod(
        name="lora", prepare=prepare_lora, save=save_lora, replacements=lora_replacements
    ),
    FinetuningMethod(
        name="bottleneck", prepare=prepare_bottleneck, save=save_bottleneck, replacements=None
    ),
)

FINETUNING_METHODS: dict[str, FinetuningMethod] = {row.name: row for row in _ROWS}
"""Every fine-tuning method by the name that ``--method`` takes."""


def finetuning_method(name: str) -> FinetuningMethod:
    """Return the method of that name; raise :class:`ConfigError` for any other."""
    if name not in FINETUNING_METHODS:
        raise ConfigError(unknown_name("fine-tuning method", name, FINETUNING_METHODS))
    return FINETUNING_METHODS[name]
