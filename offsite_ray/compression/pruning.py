# SPDX-License-Identifier: Apache-2.0
"""Pruning by magnitude: the smallest weights of a matrix become zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


def prune_smallest(weight: Tensor, ratio: float) -> Tensor:
    """Return a matrix of which ``round(ratio * size)`` weights, the smallest, are zero.

    The threshold is the matrix's own (Han et al., arXiv 1506.02626, section 3). Of weights that
    are equal, the first ones go, so that the number is exact: bfloat16 has many that are.
    """
    count = round(ratio * weight.numel())
    if count == 0:
        return weight.clone()
    size = weight.abs().flatten()
    threshold = size.kthvalue(count).values
    pruned = size < threshold
    at_threshold = (size == threshold).nonzero().flatten()
    pruned[at_threshold[: count - int(pruned.sum())]] = True
    return weight.masked_fill(pruned.view_as(weight), 0.0)


def prune_pattern(weight: Tensor, kept: int, group: int) -> Tensor:
    """Return a matrix that keeps the ``kept`` largest of each ``group`` weights along the inputs.

    2:4 is what NVIDIA's sparse tensor cores compute with (Mishra et al., arXiv 2104.08378). Of
    weights that are equal, the first ones stay; a last, shorter group keeps as many.
    """
    num_inputs = weight.shape[1]
    size = F.pad(weight.abs(), (0, -num_inputs % group), value=-1.0).view(len(weight), -1, group)
    order = size.argsort(dim=-1, descending=True, stable=True)
    pruned = torch.ones_like(size, dtype=torch.bool).scatter_(-1, order[..., :kept], False)
    return weight.masked_fill(pruned.flatten(1)[:, :num_inputs], 0.0)
