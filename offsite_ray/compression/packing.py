# SPDX-License-Identifier: Apache-2.0
"""Quantized matrices in as many bits as they have, and back to what they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from offsite_ray.compression.quantization import GROUP_SIZE, Quantized

if TYPE_CHECKING:
    from torch import Tensor

PACKED_BITS = (4, 8)
"""Bits for which there is a packed form; other widths are stored as what they stand for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTensor:
    """What a packed matrix unpacks to, and what it is stored as.

    Stored are its values, ``(out, in)`` int8 or ``(out, ceil(in / 2))`` uint8 with two values each
    (the first in the low half, in two's complement), and the scales of their groups.
    """

    bits: int
    shape: tuple[int, int]
    """Of the tensor that it unpacks to."""
    dtype: torch.dtype
    """Of the tensor that it unpacks to."""
    transposed: bool
    """Whether that tensor is ``(in, out)``, as GPT-2 has it."""

    @property
    def part_layouts(self) -> list[tuple[torch.dtype, tuple[int, int]]]:
        """Type and shape of the stored values, and of the stored scales."""
        num_outputs, num_inputs = self._matrix_shape
        values = torch.int8 if self.bits == 8 else torch.uint8
        return [
            (values, (num_outputs, -(-num_inputs * self.bits // 8))),
            (torch.float32, (num_outputs, -(-num_inputs // GROUP_SIZE))),
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the values and the scales."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.part_layouts)

    @property
    def _matrix_shape(self) -> tuple[int, int]:
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape

    def part_names(self, name: str) -> tuple[str, str]:
        """Return the names of the stored values and scales of the tensor called ``name``."""
        return f"{name}.int{self.bits}", f"{name}.scales"

    def unpack(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return the tensor that stored values and scales stand for."""
        if self.bits == 4:
            halves = torch.stack([values & 15, values >> 4], dim=-1).flatten(1)
            values = (halves.to(torch.int8) ^ 8) - 8
        values = values[:, : self._matrix_shape[1]]
        matrix = Quantized(values=values, scales=scales).dequantized().to(self.dtype)
        return matrix.T.contiguous() if self.transposed else matrix


def pack(quantized: Quantized, bits: int) -> Tensor:
    """Return the values as they are stored; see :class:`PackedTensor`."""
    if bits == 8:
        return quantized.values
    num_inputs = quantized.values.shape[1]
    halves = (F.pad(quantized.values, (0, num_inputs % 2)) & 15).to(torch.uint8)
    return halves[:, 0::2] | (halves[:, 1::2] << 4)
