# SPDX-License-Identifier: Apache-2.0
"""Emulator bundles with packed matrices: values of a few bits with scales beside them.

No stock model has such tensors, so the directory says so twice: its ``model_type`` is one that
transformers refuses, and its weights are in ``packed*.safetensors``, which no stock class looks
for, whatever config it is given.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from offsite_ray.compression import GROUP_SIZE, PACKED_BITS, PackedTensor
from offsite_ray.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

PACKED_TYPE = "offsite_packed"
"""``model_type`` of such a directory."""

PACKED_STEM = "packed"
"""With which the names of its weights' files begin."""

PACKED_FILE = re.compile(rf"{PACKED_STEM}(-\d{{5}}-of-\d{{5}})?\.safetensors")

PACKED_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""What tensors may unpack to."""

NEEDS = (
    "the matrices of the emulator blocks are packed, which no stock model class reads: load with "
    "offsite_ray.architectures.load_model, or write a stock model with 'offsite-ray unpack'"
)
"""Why stock transformers cannot load it, in words."""


def packed_config(base: Mapping[str, Any], packed: Mapping[str, PackedTensor]) -> dict[str, Any]:
    """Return what ``config.json`` of a packed bundle holds.

    Args:
        base: What it would hold if nothing was packed.
        packed: Name to what is packed, and how.
    """
    tensors = {
        name: {
            "bits": tensor.bits,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "transposed": tensor.transposed,
        }
        for name, tensor in packed.items()
    }
    return {
        "model_type": PACKED_TYPE,
        "architectures": ["OffsitePackedModel"],
        "needs": NEEDS,
        "base_config": dict(base),
        "packed": {"group_size": GROUP_SIZE, "tensors": tensors},
    }


def packed_tensors(values: Mapping[str, Any]) -> dict[str, PackedTensor]:
    """Return what a ``config.json`` says of packed tensors, by name.

    Raises:
        IntegrityError: It does not say it as :func:`packed_config` does.
    """
    try:
        packed = values["packed"]
        if packed["group_size"] != GROUP_SIZE:
            raise ValueError(f"groups of {packed['group_size']!r}, not {GROUP_SIZE}")
        if not packed["tensors"]:
            raise ValueError("none is packed")
        return {name: _tensor(entry) for name, entry in packed["tensors"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(
            f"config.json does not say how its tensors are packed: {error!r}"
        ) from error


def _tensor(entry: Mapping[str, Any]) -> PackedTensor:
    rows, columns = entry["shape"]
    numbers = (entry["bits"], rows, columns)
    if any(type(number) is not int or number < 1 for number in numbers):
        raise ValueError(f"{numbers} are not bits and a shape")
    if entry["bits"] not in PACKED_BITS or type(entry["transposed"]) is not bool:
        raise ValueError(f"{entry['bits']} bits, transposed {entry['transposed']!r}")
    return PackedTensor(
        bits=entry["bits"],
        shape=(rows, columns),
        dtype=PACKED_DTYPES[entry["dtype"]],
        transposed=entry["transposed"],
    )


def packed_files(directory: Path) -> list[Path]:
    """Return the files with the weights of a packed bundle, in order."""
    return sorted(p for p in directory.iterdir() if PACKED_FILE.fullmatch(p.name))


def unpacked_state(directory: Path, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return every tensor of a packed bundle by name, unpacked; what is not packed is mapped.

    Raises:
        IntegrityError: A part of a packed tensor is missing or of another shape or type.
    """
    state: dict[str, Tensor] = {}
    for file in packed_files(directory):
        with safe_open(file, "pt") as saved:
            state |= {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    for name, tensor in packed_tensors(values).items():
        parts = [state.pop(part, None) for part in tensor.part_names(name)]
        found = [None if part is None else (part.dtype, tuple(part.shape)) for part in parts]
        if found != tensor.part_layouts or name in state:
            raise IntegrityError(
                f"{directory}: the parts of tensor {name!r} are {found}, not {tensor.part_layouts}"
            )
        state[name] = tensor.unpack(*parts)  # type: ignore[arg-type]
    return state
