# SPDX-License-Identifier: Apache-2.0
"""Gradient-preserving compression: cases computed by hand, and the definition entry by entry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from offsite_ray.compression import MatrixStatistics, parse_compression
from offsite_ray.compression.gradient_preserving import (
    ScoredMatrix,
    Scores,
    channel_scores,
    column_scores,
    component_scores,
    keep_components,
    remove_channels,
    row_scores,
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


def score(matrix: ScoredMatrix, change: Tensor, privacy: float) -> float:
    """Return the score of a change, ``(out, in)``: the definition, entry by entry."""
    curved = matrix.outputs @ change @ matrix.inputs
    return float(curved.abs().sum() - privacy * (matrix.gradient * change).sum())


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
    removals = [
        (
            component_scores(matrix),
            [-values[k] * torch.outer(left[:, k], right[k]) for k in range(4)],
        ),
        (row_scores(matrix), [-matrix.weight * (torch.arange(4) == j)[:, None] for j in range(4)]),
        (column_scores(matrix), [-matrix.weight * (torch.arange(6) == j) for j in range(6)]),
    ]
    for scores, changes in removals:
        expected = torch.tensor([score(matrix, change, privacy) for change in changes])
        torch.testing.assert_close(scores.total(privacy), expected, rtol=1e-4, atol=1e-4)


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
    total = component_scores(matrix).total(1.0)
    torch.testing.assert_close(keep_components(matrix.weight, total, 2), diagonal(*kept))


def test_the_largest_scores_stay_in_any_rank() -> None:
    matrix = drawn(5, 7)
    whole = keep_components(matrix.weight, torch.zeros(5), 5)
    torch.testing.assert_close(whole, matrix.weight)
    by_value = keep_components(matrix.weight, torch.linalg.svdvals(matrix.weight), 3)
    torch.testing.assert_close(by_value, truncate(matrix.weight, 3))


def test_a_larger_privacy_raises_the_loss_more() -> None:
    matrix = drawn(12, 10, seed=3)
    rises = []
    for privacy in (0.0, 1.0, 100.0):
        kept = keep_components(matrix.weight, component_scores(matrix).total(privacy), 4)
        assert int(torch.linalg.matrix_rank(kept)) == 4
        rises.append(float((matrix.gradient * (kept - matrix.weight)).sum()))
    assert rises == sorted(rises)
    assert rises[0] < rises[2]


def test_the_channels_that_score_least_are_removed() -> None:
    up = scored(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
    gate = scored(torch.tensor([[0.0, 5.0], [0.0, 1.0], [1.0, 0.0]]))
    down = scored(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    total = channel_scores([up, gate], down).total(0.0)
    assert total.tolist() == [1 + 5 + 1, 2 + 1 + 1, 3 + 1 + 1]
    assert remove_channels(up.weight, total, 1, 0).tolist() == [[1, 0], [0, 0], [0, 3]]
    assert remove_channels(down.weight, total, 1, 1).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert torch.equal(up.weight[1], torch.tensor([2.0, 0.0])), "the given one stays"
    assert channel_scores([up], down).total(0.0).tolist() == [2, 3, 4]
    assert remove_channels(up.weight, total, 2, 0).tolist() == [[1, 0], [0, 0], [0, 0]]
    assert torch.equal(remove_channels(up.weight, total, 0, 0), up.weight)


def test_a_step_takes_what_is_said_of_a_matrix() -> None:
    apply = parse_compression("gradient_preserving:0.5:0:2").apply
    scores = Scores(torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 1, 1, 0]))
    weight = torch.ones(4, 2)
    # privacy 2 in the feed-forward: 21, 4, 5, 4
    rows = apply(weight, MatrixStatistics(channels=scores, channel_axis=0))
    assert rows.tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]
    columns = apply(weight.T.contiguous(), MatrixStatistics(channels=scores, channel_axis=1))
    assert torch.equal(columns, rows.T)
    # none in attention: 1, 2, 3, 4, of which the largest component stays all the same
    square = apply(diagonal(4, 3, 2, 1), MatrixStatistics(components=scores))
    torch.testing.assert_close(square, diagonal(4, 0, 0, 0))
    wider = parse_compression("gradient_preserving:1:0").apply
    square = wider(diagonal(4, 3, 2, 1), MatrixStatistics(components=scores))
    torch.testing.assert_close(square, diagonal(4, 0, 0, 1))
    torch.testing.assert_close(apply(diagonal(1, 2)), diagonal(0, 2))  # nothing said: by value
