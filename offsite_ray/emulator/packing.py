# SPDX-License-Identifier: Apache-2.0
"""Bundles with packed matrices: what is written of them, at first and again after training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.architectures import config_values
from offsite_ray.architectures.packed import packed_config
from offsite_ray.bundle import (
    PackedDirectory,
    TensorDirectory,
    TensorSpec,
    digest_file,
    lazy_spec,
    packed_specs,
    write_model,
    write_packed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from offsite_ray.compression import PackedTensor


def write_weights(
    directory: Path, tensors: Sequence[TensorSpec], packed: Mapping[str, PackedTensor]
) -> dict[str, str]:
    """Write the weights of a bundle under the file names of its form; return names and digests."""
    return write_packed(directory, tensors) if packed else write_model(directory, tensors)


def wrap_config(directory: Path, packed: Mapping[str, PackedTensor]) -> dict[str, str]:
    """Make the ``config.json`` in a directory that of a packed bundle, if anything is packed.

    Returns:
        Its name and digest; nothing where it stays as it is.
    """
    if not packed:
        return {}
    return write_config(directory, packed_config(config_values(directory), packed))


def write_config(directory: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """Write ``config.json``; return its name and digest."""
    file = directory / "config.json"
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {file.name: digest_file(file)}


def packed_again(
    weights: PackedDirectory, replacements: Mapping[str, Callable[[], Tensor]]
) -> list[TensorSpec]:
    """Return the tensors of a packed bundle as it stores them, some of them with other values.

    Args:
        weights: Of the bundle.
        replacements: Name to what returns the new tensor, of the shape that it unpacks to; it is
            rounded to the levels of its own, new scales.
    """
    found: list[TensorSpec] = []
    for name in weights.tensors:
        if name not in weights.packed:
            found.append(as_read(weights, name, replacements.get(name)))
        elif name not in replacements:
            found += weights.parts(name)
        else:
            packed = weights.packed[name]
            found += packed_specs(name, packed, _matrix(replacements[name], packed))
    return found


def as_read(
    weights: TensorDirectory, name: str, new: Callable[[], Tensor] | None = None
) -> TensorSpec:
    """Return a tensor as it reads, unpacked, or with other values, as something to write."""
    info = weights.tensors[name]
    if new is not None:
        return lazy_spec(name, info.dtype, info.shape, new)
    return TensorSpec(
        name=name, dtype=info.dtype, shape=info.shape, pieces=lambda: weights.pieces(name)
    )


def _matrix(new: Callable[[], Tensor], packed: PackedTensor) -> Callable[[], Tensor]:
    def matrix() -> Tensor:
        tensor = new().to(torch.float32)
        return tensor.T.contiguous() if packed.transposed else tensor

    return matrix
