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


@dataclass(frozen=True, slots=True)
class Scores:
    """What removing each of some parts of a matrix scores, but for the privacy."""

    curvature: Tensor
    """``(K,)``: ``|H D|_1``."""
    slope: Tensor
    """``(K,)``: ``-<dL/dW, D>``."""

    def total(self, privacy: float) -> Tensor:
        """Return the scores, ``(K,)``."""
        return self.curvature + privacy * self.slope

    def __add__(self, other: Scores) -> Scores:
        """Return the scores of parts that are removed together."""
        return Scores(self.curvature + other.curvature, self.slope + other.slope)


def component_scores(matrix: ScoredMatrix) -> Scores:
    """Return the scores of the singular components ``s_k u_k v_k^T``, largest value first.

    ``s_k |G u_k|_1 |A v_k|_1`` and ``s_k u_k^T (dL/dW) v_k``.
    """
    left, values, right = torch.linalg.svd(matrix.weight, full_matrices=False)
    outputs = (matrix.outputs @ left).abs().sum(0)
    inputs = (matrix.inputs @ right.T).abs().sum(0)
    slope = torch.einsum("ok,oi,ki->k", left, matrix.gradient, right)
    return Scores(values * outputs * inputs, values * slope)


def row_scores(matrix: ScoredMatrix) -> Scores:
    """Return the scores of the output channels."""
    curved = matrix.outputs.abs().sum(0) * (matrix.weight @ matrix.inputs).abs().sum(1)
    return Scores(curved, (matrix.gradient * matrix.weight).sum(1))


def column_scores(matrix: ScoredMatrix) -> Scores:
    """Return the scores of the inputs."""
    curved = (matrix.outputs @ matrix.weight).abs().sum(0) * matrix.inputs.abs().sum(1)
    return Scores(curved, (matrix.gradient * matrix.weight).sum(0))


def channel_scores(ups: Sequence[ScoredMatrix], down: ScoredMatrix) -> Scores:
    """Return the scores of a feed-forward's inner channels.

    A channel is a row of each matrix into the inner width and a column of the one out of it.

    Args:
        ups: The matrices into the inner width, ``(inner, hidden)`` each: one, or up and gate.
        down: The matrix out of it, ``(hidden, inner)``.
    """
    scores = column_scores(down)
    for up in ups:
        scores = scores + row_scores(up)
    return scores


def keep_components(weight: Tensor, total: Tensor, rank: int) -> Tensor:
    """Return a matrix of some rank: the singular components whose removal scores most stay.

    Of the largest singular values some stay whatever they score; see :data:`ALWAYS_KEPT`.

    Args:
        weight: ``(out, in)``.
        total: ``(R,)``: what removing each component scores, largest singular value first.
        rank: At least 1.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    ranked = total.clone()
    ranked[: math.ceil(ALWAYS_KEPT * len(values))] = math.inf
    kept = ranked.argsort(descending=True, stable=True)[:rank].sort().values
    truncated: Tensor = (left[:, kept] * values[kept]) @ right[kept]
    return truncated


def remove_channels(weight: Tensor, total: Tensor, count: int, axis: int) -> Tensor:
    """Return a matrix with the channels at zero whose removal scores least.

    Args:
        weight: ``(out, in)``.
        total: What removing each channel scores.
        count: Channels to remove.
        axis: 0 where a channel is a row, 1 where it is a column.
    """
    return weight.index_fill(axis, total.argsort(stable=True)[:count], 0.0)
