# SPDX-License-Identifier: Apache-2.0
"""Quantization: the weights of a group share a scale, and are whole multiples of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

GROUP_SIZE = 128
"""Weights along the inputs of one output channel that share a scale."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix as whole numbers and scales."""

    values: Tensor
    """``(out, in)`` int8."""
    scales: Tensor
    """``(out, ceil(in / GROUP_SIZE))`` float32."""

    def dequantized(self) -> Tensor:
        """Return the matrix, ``(out, in)`` float32: each value times its group's scale."""
        num_inputs = self.values.shape[1]
        scales = self.scales.repeat_interleave(GROUP_SIZE, dim=1)[:, :num_inputs]
        return self.values.float() * scales


def quantize(weight: Tensor, bits: int) -> Quantized:
    """Return a matrix rounded to the nearest of ``2**bits - 1`` levels around zero.

    ``q = round(w / s)`` with ``s = max|w| / (2**(bits-1) - 1)`` over a group: symmetric, without
    the lowest code, so that zero stays zero (Wu et al., arXiv 2004.09602, section 3.1.2), by
    groups as in Q-BERT (Shen et al., arXiv 1909.05840). One bit is the sign, times the mean
    magnitude, which is the nearest such matrix (Rastegari et al., arXiv 1603.05279, section 3.1);
    zero has none of its own there and counts as positive.

    Args:
        weight: ``(out, in)`` float32.
        bits: 1 to 8.
    """
    num_inputs = weight.shape[1]
    grouped = F.pad(weight, (0, -num_inputs % GROUP_SIZE)).view(len(weight), -1, GROUP_SIZE)
    if bits == 1:
        present = F.pad(torch.ones(num_inputs), (0, -num_inputs % GROUP_SIZE)).view(-1, GROUP_SIZE)
        scales = grouped.abs().sum(-1) / present.sum(-1)
        values = torch.where(grouped < 0, -1.0, 1.0)
    else:
        most = 2 ** (bits - 1) - 1
        # A group of zeros has a scale too, by which it can be divided.
        scales = (grouped.abs().amax(-1) / most).clamp_min(torch.finfo(torch.float32).tiny)
        values = (grouped / scales[..., None]).round().clamp(-most, most)
    whole = values.to(torch.int8).flatten(1)[:, :num_inputs].contiguous()
    return Quantized(values=whole, scales=scales)
