# SPDX-License-Identifier: Apache-2.0
"""Compression that leaves the adapter's gradients as they are and the emulator's loss higher.

GradOT (Yao et al., arXiv 2507.04455) scores a change ``D`` of a matrix by
``|H D|_1 - p <dL/dW, D>`` and makes the changes that score least: the first term is what the change
does to gradients, the second, weighted by the privacy ``p``, is how much it raises the loss of the
emulator by itself. The curvature is Kronecker-factored (Martens and Grosse, arXiv 1503.05671),
``H vec(D) = vec(G D A)`` with ``A = E[a a^T]`` of a layer's inputs and ``G = E[g g^T]`` of the
gradients at its outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

ALWAYS_KEPT = 0.05
"""Share of the largest singular values that is never removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredMatrix:
    """A matrix with what some text says of it; means over tokens, float32."""

    weight: Tensor
    """``(out, in)``."""
    inputs: Tensor
    """``A``, ``(in, in)``."""
    outputs: Tensor
    """``G``, ``(out, out)``."""
    gradient: Tensor
    """``dL/dW``, ``(out, in)``."""


def score(matrix: ScoredMatrix, change: Tensor, privacy: float) -> float:
    """Return the score of a change, ``(out, in)``: the definition, entry by entry."""
    curved = matrix.outputs @ change @ matrix.inputs
    return float(curved.abs().sum() - privacy * (matrix.gradient * change).sum())


def component_scores(
    matrix: ScoredMatrix, left: Tensor, values: Tensor, right: Tensor, privacy: float
) -> Tensor:
    """Return the score of removing each singular component, ``(R,)``.

    ``s_k |G u_k|_1 |A v_k|_1 + p s_k u_k^T (dL/dW) v_k``.

    Args:
        matrix: What is decomposed.
        left: ``U``, ``(out, R)``.
        values: ``s``, ``(R,)``.
        right: ``V^T``, ``(R, in)``.
        privacy: Weight of the emulator's loss.
    """
    outputs = (matrix.outputs @ left).abs().sum(0)
    inputs = (matrix.inputs @ right.T).abs().sum(0)
    slope = torch.einsum("ok,oi,ki->k", left, matrix.gradient, right)
    return values * (outputs * inputs + privacy * slope)


def truncate_preserving(matrix: ScoredMatrix, rank: int, privacy: float) -> Tensor:
    """Return a matrix of some rank: the components whose removal scores most stay.

    Of the largest singular values some stay whatever they score; see :data:`ALWAYS_KEPT`.
    """
    left, values, right = torch.linalg.svd(matrix.weight, full_matrices=False)
    scores = component_scores(matrix, left, values, right, privacy)
    scores[: math.ceil(ALWAYS_KEPT * len(values))] = math.inf
    kept = scores.argsort(descending=True, stable=True)[:rank].sort().values
    truncated: Tensor = (left[:, kept] * values[kept]) @ right[kept]
    return truncated


def row_scores(matrix: ScoredMatrix, privacy: float) -> Tensor:
    """Return the score of removing each output channel, ``(out,)``."""
    curved = matrix.outputs.abs().sum(0) * (matrix.weight @ matrix.inputs).abs().sum(1)
    return curved + privacy * (matrix.gradient * matrix.weight).sum(1)


def column_scores(matrix: ScoredMatrix, privacy: float) -> Tensor:
    """Return the score of removing each input, ``(in,)``."""
    curved = (matrix.outputs @ matrix.weight).abs().sum(0) * matrix.inputs.abs().sum(1)
    return curved + privacy * (matrix.gradient * matrix.weight).sum(0)


def prune_channels(
    ups: Sequence[ScoredMatrix], down: ScoredMatrix, count: int, privacy: float
) -> tuple[list[Tensor], Tensor]:
    """Return a feed-forward's matrices with some of its inner channels set to zero.

    A channel is a row of each matrix into the inner width and a column of the one out of it; its
    score is the sum of theirs, and the ones that score least go.

    Args:
        ups: The matrices into the inner width, ``(inner, hidden)`` each: one, or up and gate.
        down: The matrix out of it, ``(hidden, inner)``.
        count: Channels to remove.
        privacy: Weight of the emulator's loss.
    """
    scores = column_scores(down, privacy)
    for up in ups:
        scores = scores + row_scores(up, privacy)
    removed = scores.argsort(stable=True)[:count]
    return (
        [up.weight.index_fill(0, removed, 0.0) for up in ups],
        down.weight.index_fill(1, removed, 0.0),
    )
