# SPDX-License-Identifier: Apache-2.0
"""Selection methods: what the paper's formula gives, and what holds for every method."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offsite_ray.errors import PlanError
from offsite_ray.selection import SELECTION_METHODS, selection_method, uniform


@st.composite
def middles(draw: st.DrawFn) -> tuple[list[int], int]:
    """Draw a middle (with gaps, as adapter blocks in between make them) and how much to keep."""
    middle = sorted(draw(st.sets(st.integers(0, 200), min_size=1, max_size=80)))
    return middle, draw(st.integers(0, len(middle)))


@pytest.mark.parametrize(
    ("size", "num_kept", "kept"),
    [
        (8, 4, [0, 2, 5, 7]),  # strides of 7/3
        (20, 8, [0, 3, 5, 8, 11, 14, 16, 19]),  # 2-8-2 of 24 blocks, the paper's OPT-1.3B
        (44, 18, [0, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25, 28, 30, 33, 35, 38, 40, 43]),
        (6, 3, [0, 2, 5]),  # 2.5 rounds half to even
        (4, 3, [0, 2, 3]),  # 1.5 rounds half to even
        (4, 4, [0, 1, 2, 3]),
        (5, 2, [0, 4]),
        (5, 1, [2]),
        (4, 1, [1]),
        (1, 1, [0]),
        (5, 0, []),
    ],
)
def test_uniform_keeps_evenly_spaced_blocks(size: int, num_kept: int, kept: list[int]) -> None:
    assert uniform(range(size), num_kept) == kept
    assert uniform(range(10, 10 + size), num_kept) == [10 + index for index in kept]


@given(middles())
def test_uniform_is_the_formula_of_the_paper(drawn: tuple[list[int], int]) -> None:
    middle, num_kept = drawn
    kept = uniform(middle, num_kept)
    if num_kept > 1:
        stride = Fraction(len(middle) - 1, num_kept - 1)
        assert [kept[0], kept[-1]] == [middle[0], middle[-1]]
        # within half a block of the exact place, whichever way a half is rounded
        for i, block in enumerate(kept):
            assert abs(middle.index(block) - i * stride) <= Fraction(1, 2)
    elif num_kept == 1:
        below, above = (sum(b < kept[0] for b in middle), sum(b > kept[0] for b in middle))
        assert above - below in (0, 1)


@pytest.mark.parametrize("name", sorted(SELECTION_METHODS))
@given(drawn=middles())
def test_every_method_keeps_as_many_as_asked_in_order(
    name: str, drawn: tuple[list[int], int]
) -> None:
    middle, num_kept = drawn
    kept = list(selection_method(name)(middle, num_kept))
    assert len(kept) == num_kept
    assert kept == sorted(set(kept))
    assert set(kept) <= set(middle)
    assert list(selection_method(name)(middle, len(middle))) == middle


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PlanError, match=r"'uniforn'; did you mean 'uniform'\?.*known: .*uniform"):
        selection_method("uniforn")
