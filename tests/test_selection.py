# SPDX-License-Identifier: Apache-2.0
"""Selection methods: what the paper's formula gives, and what holds for every method."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offsite_ray.errors import PlanError
from offsite_ray.selection import (
    SELECTION_METHODS,
    angular,
    block_influence,
    cka_cluster,
    greedy,
    layer_replace,
    nearest_kept,
    selection_method,
    tail,
    uniform,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence


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


class Told:
    """Signals as a test tells them."""

    def __init__(
        self,
        influence: Sequence[float] = (),
        states: Sequence[float] = (),
        loss: Callable[[Collection[int]], float] = len,
    ) -> None:
        self._influence, self._states, self._loss = influence, states, loss

    def influence(self, block: int) -> float:
        return self._influence[block % len(self._influence)]

    def distance(self, first: int, count: int) -> float:
        return abs(self._states[(first + count) % 7] - self._states[first % 7])

    def alignment(self, a: int, b: int) -> float:
        return 1 / (1 + abs(self._states[a % 7] - self._states[b % 7]))

    def loss(self, dropped: Collection[int]) -> float:
        return self._loss(dropped)

    def scores(self, middle: Sequence[int], num_kept: int) -> Mapping[int, float]:
        return {block: self.influence(block) for block in middle}


ANY = Told(
    (0.3, 0.1, 0.2, 0.1), (0.0, 0.5, 0.1, 0.9, 0.4, 0.2, 0.7), lambda dropped: sum(dropped) % 11
)


@pytest.mark.parametrize("name", sorted(set(SELECTION_METHODS) - {"explicit", "angular"}))
@given(drawn=middles())
def test_every_method_keeps_as_many_as_asked_in_order(
    name: str, drawn: tuple[list[int], int]
) -> None:
    middle, num_kept = drawn
    if name == "greedy":
        middle = middle[:12]
        num_kept = min(num_kept, len(middle))
    choose = selection_method(name).choose
    kept = list(choose(middle, num_kept, ANY))
    assert len(kept) == num_kept
    assert kept == sorted(set(kept))
    assert set(kept) <= set(middle)
    assert list(choose(middle, len(middle), ANY)) == middle


def test_tail_drops_the_end() -> None:
    assert tail([2, 3, 4, 7, 8], 3) == [2, 3, 4]


def test_block_influence_keeps_what_changes_most() -> None:
    told = Told(influence=[9.0, 0.4, 0.1, 0.3, 0.3, 0.2, 9.0])
    assert block_influence(range(1, 6), 3, told) == [1, 3, 4]
    assert block_influence(range(1, 6), 2, told) == [1, 3], "of equals, the lower one"


def test_angular_drops_the_run_that_turns_least() -> None:
    # from 1 on: |1.0 - 0.4|, |0.45 - 0.4|, |0.5 - 1.0| across two blocks
    told = Told(states=[0.0, 0.4, 1.0, 0.45, 0.5, 0.9, 0.0])
    assert angular([1, 2, 3, 4, 5], 3, told) == [3, 4, 5]
    assert angular([1, 2, 3, 4, 5], 5, told) == [1, 2, 3, 4, 5]
    assert angular([1, 2, 3], 0, told) == []
    with pytest.raises(PlanError, match="drops 3 neighbouring blocks, and the adapter"):
        angular([1, 2, 4, 5], 1, told)


def test_cka_merges_the_neighbours_that_are_most_alike() -> None:
    # 2 and 3 first (0.0 apart), then 4 to them (0.1 of 3), then 0 and 1 (0.2)
    told = Told(states=[0.0, 0.2, 0.8, 0.8, 0.9, 0.5, 0.0])
    assert cka_cluster([0, 1, 2, 3, 4, 5], 5, told) == [0, 1, 3, 4, 5]
    assert cka_cluster([0, 1, 2, 3, 4, 5], 4, told) == [0, 1, 3, 5]
    assert cka_cluster([0, 1, 2, 3, 4, 5], 3, told) == [1, 3, 5]


def test_greedy_drops_what_hurts_least_given_what_is_gone() -> None:
    # without 0, 1 or 2; then without 1 and another
    losses = {(0,): 3.0, (1,): 2.0, (2,): 2.5, (0, 1): 5.0, (1, 2): 4.0}
    told = Told(loss=lambda dropped: losses[tuple(sorted(dropped))])
    assert greedy([0, 1, 2], 2, told) == [0, 2]
    assert greedy([0, 1, 2], 1, told) == [0]


def test_layer_replace_keeps_the_highest_scores() -> None:
    told = Told(influence=[9.0, 0.4, -0.1, 0.3, 0.3, -0.2, 9.0])
    assert layer_replace(range(1, 6), 2, told) == [1, 3], "of equals, the lower one"
    assert layer_replace(range(1, 6), 4, told) == [1, 2, 3, 4]


def test_a_copy_is_of_the_nearest_of_its_kind() -> None:
    assert nearest_kept("aaaaaa", [0, 3, 5]) == {0: 0, 1: 0, 2: 3, 3: 3, 4: 5, 5: 5}
    assert nearest_kept("abbaab", [0, 2]) == {0: 0, 1: 2, 2: 2, 3: 0, 4: 0, 5: 2}
    with pytest.raises(ValueError, match="no block of the kind 'b' is kept that block 1"):
        nearest_kept("aba", [0, 2])


def test_explicit_selects_nothing() -> None:
    with pytest.raises(PlanError, match="name the 1 of 3 blocks in the plan"):
        selection_method("explicit").choose([1, 2, 3], 1, None)


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PlanError, match=r"'uniforn'; did you mean 'uniform'\?.*known: .*uniform"):
        selection_method("uniforn")
