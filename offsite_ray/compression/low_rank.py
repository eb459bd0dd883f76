# SPDX-License-Identifier: Apache-2.0
"""Low rank: a matrix as the product of two thin ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from offsite_ray.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


_MOST_DAMPING = 8
"""Times that the damping is made ten times as large."""


def kept_rank(weight: Tensor, ratio: float) -> int:
    """Return the rank at which both factors have at most ``ratio`` of a matrix's parameters.

    ``floor(ratio * out * in / (out + in))``, at least 1. With ratio 1 that is half the rank of a
    square matrix.
    """
    num_outputs, num_inputs = weight.shape
    return max(1, int(ratio * num_outputs * num_inputs / (num_outputs + num_inputs)))


def truncate(weight: Tensor, rank: int) -> Tensor:
    """Return the nearest matrix of some rank: ``U_k S_k V_k^T`` (Eckart and Young, 1936)."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    truncated: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
    return truncated


def truncate_whitened(weight: Tensor, moment: Tensor, rank: int, damping: float = 1e-6) -> Tensor:
    """Return the matrix of some rank whose outputs are nearest on the inputs that it has.

    With ``A = E[a a^T] = S S^T`` (Cholesky), the truncated SVD of ``W S``, times ``S^-1``,
    minimises ``E|W a - W' a|^2``: SVD-LLM, Wang et al., arXiv 2403.07378, section 3.1.

    A moment that was summed in float32 may have eigenvalues a little below zero, those of
    directions in which nothing was seen: the damping grows until there is a root.

    Args:
        weight: ``(out, in)``.
        moment: ``(in, in)``: ``A``, over tokens. Fewer tokens than inputs leave directions in which
            nothing was seen.
        rank: At least 1.
        damping: Added to the diagonal of ``A``, as a share of its mean; the least that is tried.

    Raises:
        DataError: The moment is not finite.
    """
    wide = moment.double()
    floor = damping * wide.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    root = _root(wide, floor)
    seen = truncate(weight.double() @ root, rank)
    found: Tensor = torch.linalg.solve_triangular(root, seen, upper=False, left=False)
    return found.to(weight.dtype)


def _root(moment: Tensor, floor: Tensor) -> Tensor:
    """Return the Cholesky factor of a moment with as little on its diagonal as lets it have one."""
    identity = torch.eye(len(moment), dtype=moment.dtype)
    root: Tensor
    for power in range(_MOST_DAMPING):
        root, failed = torch.linalg.cholesky_ex(moment + 10**power * floor * identity)
        if not failed:
            return root
    raise DataError(
        "what goes into a matrix of the full model on the text of --calibration is not finite; "
        "calibrate on other text"
    )
