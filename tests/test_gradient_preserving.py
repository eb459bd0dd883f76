# SPDX-License-Identifier: Apache-2.0
"""Gradient-preserving compression: cases computed by hand, and the definition entry by entry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from offsite_ray.compression.gradient_preserving import (
    ScoredMatrix,
    column_scores,
    component_scores,
    prune_channels,
    row_scores,
    score,
    truncate_preserving,
)
from offsite_ray.compression.low_rank import truncate

if TYPE_CHECKING:
    from torch import Tensor


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float32))


def scored(
    weight: Tensor,
    inputs: Tensor | None = None,
    outputs: Tensor | None = None,
    gradient: Tensor | None = None,
) -> ScoredMatrix:
    """Return a matrix whose text says nothing but what is given."""
    rows, columns = weight.shape
    return ScoredMatrix(
        weight=weight,
        inputs=torch.eye(columns) if inputs is None else inputs,
        outputs=torch.eye(rows) if outputs is None else outputs,
        gradient=torch.zeros(rows, columns) if gradient is None else gradient,
    )


def drawn(rows: int, columns: int, seed: int = 0) -> ScoredMatrix:
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(40, n, generator=generator) for n in (columns, rows))
    weight, gradient = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    return ScoredMatrix(weight=weight, inputs=a.T @ a / 40, outputs=g.T @ g / 40, gradient=gradient)


def test_the_score_of_a_change() -> None:
    matrix = scored(
        torch.eye(2), diagonal(1, 2), diagonal(3, 4), torch.tensor([[5.0, 0.0], [0.0, 6.0]])
    )
    # G D A = [[3, 6], [0, -8]], and <gradient, D> = 5 - 6
    assert score(matrix, torch.tensor([[1.0, 1.0], [0.0, -1.0]]), 0.5) == 17 + 0.5


@pytest.mark.parametrize("privacy", [0.0, 0.7])
def test_the_scores_of_parts_are_those_of_their_removal(privacy: float) -> None:
    matrix = drawn(4, 6)
    left, values, right = torch.linalg.svd(matrix.weight, full_matrices=False)
    components = component_scores(matrix, left, values, right, privacy)
    for k in range(4):
        removal = -values[k] * torch.outer(left[:, k], right[k])
        assert float(components[k]) == pytest.approx(score(matrix, removal, privacy), rel=1e-4)
    for j in range(4):
        removal = torch.zeros(4, 6)
        removal[j] = -matrix.weight[j]
        expected = score(matrix, removal, privacy)
        assert float(row_scores(matrix, privacy)[j]) == pytest.approx(expected, rel=1e-4)
    for j in range(6):
        removal = torch.zeros(4, 6)
        removal[:, j] = -matrix.weight[:, j]
        expected = score(matrix, removal, privacy)
        assert float(column_scores(matrix, privacy)[j]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("inputs", "outputs", "gradient", "kept"),
    [
        # without statistics, the largest singular values: 3 and 2
        ((1, 1, 1), (1, 1, 1), (0, 0, 0), (3, 2, 0)),
        # 1 * 100 is more than 2: the inputs use the third component
        ((1, 1, 100), (1, 1, 1), (0, 0, 0), (3, 0, 1)),
        ((1, 1, 1), (1, 1, 100), (0, 0, 0), (3, 0, 1)),
        # the largest stays, although 3 * 0.01 is the least
        ((0.01, 1, 1), (1, 1, 1), (0, 0, 0), (3, 2, 0)),
        # without the second the loss would rise by 2 * 10: let it go
        ((1, 1, 1), (1, 1, 1), (0, -10, 0), (3, 0, 1)),
        # without the second the loss would fall: keep it, whatever the third scores
        ((1, 1, 3), (1, 1, 1), (0, 10, 0), (3, 2, 0)),
    ],
)
def test_components_that_matter_to_gradients_stay(
    inputs: tuple[float, ...],
    outputs: tuple[float, ...],
    gradient: tuple[float, ...],
    kept: tuple[float, ...],
) -> None:
    matrix = scored(diagonal(3, 2, 1), diagonal(*inputs), diagonal(*outputs), diagonal(*gradient))
    torch.testing.assert_close(truncate_preserving(matrix, 2, 1.0), diagonal(*kept))


def test_without_statistics_it_is_the_plain_truncation() -> None:
    matrix = scored(drawn(5, 7).weight)
    # All components have one-norms of their own; only equal ones leave the singular values alone.
    left, values, right = torch.linalg.svd(matrix.weight, full_matrices=False)
    scores = component_scores(matrix, left, values, right, 0.0)
    assert torch.allclose(scores, values * left.abs().sum(0) * right.abs().sum(1))
    torch.testing.assert_close(truncate_preserving(matrix, 5, 0.0), truncate(matrix.weight, 5))


def test_a_larger_privacy_raises_the_loss_more() -> None:
    matrix = drawn(12, 10, seed=3)
    rises = []
    for privacy in (0.0, 1.0, 100.0):
        change = truncate_preserving(matrix, 4, privacy) - matrix.weight
        assert int(torch.linalg.matrix_rank(change + matrix.weight)) == 4
        rises.append(float((matrix.gradient * change).sum()))
    assert rises == sorted(rises)
    assert rises[0] < rises[2]


def test_the_channels_that_score_least_are_removed() -> None:
    up = scored(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
    gate = scored(torch.tensor([[0.0, 5.0], [0.0, 1.0], [1.0, 0.0]]))
    down = scored(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    # channels: 1 + 5 + 1, 2 + 1 + 1, 3 + 1 + 1
    ups, narrow = prune_channels([up, gate], down, 1, 0.0)
    assert ups[0].tolist() == [[1, 0], [0, 0], [0, 3]]
    assert ups[1].tolist() == [[0, 5], [0, 0], [1, 0]]
    assert narrow.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert torch.equal(up.weight[1], torch.tensor([2.0, 0.0])), "the given one stays"
    ups, narrow = prune_channels([up], down, 2, 0.0)  # 2, 3, 4 without the gate
    assert ups[0].tolist() == [[0, 0], [0, 0], [0, 3]]
    ups, narrow = prune_channels([up], down, 0, 0.0)
    assert torch.equal(ups[0], up.weight)
    assert torch.equal(narrow, down.weight)
