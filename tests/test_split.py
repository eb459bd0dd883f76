# SPDX-License-Identifier: Apache-2.0
"""Split plans: what is refused, and what holds for every plan that is not."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offsite_ray.errors import PlanError
from offsite_ray.selection import uniform
from offsite_ray.split import SplitPlan, parse_plan
from tests.plans import MAX_BLOCKS, plans, short_plans

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def test_a_short_plan_has_a_bottom_a_middle_and_a_top() -> None:
    plan = parse_plan("2-4-2", 12, uniform)
    assert plan.adapter == (0, 1, 10, 11)
    assert plan.middle == (2, 3, 4, 5, 6, 7, 8, 9)
    assert plan.emulator == (2, 4, 7, 9)
    assert plan.kept == (0, 1, 2, 4, 7, 9, 10, 11)
    assert plan.short == "2-4-2"
    assert not plan.keeps_every_block


def test_an_explicit_plan_says_every_block() -> None:
    plan = parse_plan("adapter=0,8,17,31 emulator=1,3,5", 32, uniform)
    assert plan.adapter == (0, 8, 17, 31)
    assert plan.emulator == (1, 3, 5)
    assert [segment.blocks[0] for segment in plan.segments] == [1, 9, 18]
    assert [segment.blocks[-1] for segment in plan.segments] == [7, 16, 30]
    assert [segment.kept for segment in plan.segments] == [(1, 3, 5), (), ()]


def test_ranges_stand_for_their_blocks() -> None:
    ranges = parse_plan("adapter=0-1,6-7 emulator=2,4-5", 8, uniform)
    assert ranges == parse_plan("  adapter=0,1,6,7   emulator=2,4,5 ", 8, uniform)
    assert ranges.adapter == (0, 1, 6, 7)
    assert ranges.emulator == (2, 4, 5)


def test_the_bound_keeps_every_block() -> None:
    assert parse_plan("2-8-2", 12, uniform).keeps_every_block
    assert parse_plan("adapter=0-11 emulator=", 12, uniform).keeps_every_block


@pytest.mark.parametrize(
    "text", ["2-2", "adapter=1", "0-1-0-1", "", "2-x-2", "-1-2-3", "2 - 8 - 2"]
)
def test_text_of_no_form_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is of none of the forms"):
        parse_plan(text, 12, uniform)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("5-4-5", "needs 14 blocks, the full model has 12"),
        ("7-0-6", "needs 13 blocks"),
        ("13-0-0", "needs 13 blocks"),
        ("0-4-0", "no adapter block"),
        ("adapter= emulator=1,2", "no adapter block"),
        ("adapter=0,0 emulator=1", "each named once"),
        ("adapter=3,1 emulator=2", "ascending"),
        ("adapter=0 emulator=2,1", "ascending"),
        ("adapter=0 emulator=1,1", "each named once"),
        ("adapter=0,12 emulator=1", "adapter block 12 is not in the full model"),
        ("adapter=0 emulator=1,99", "emulator block 99"),
        ("adapter=0-3 emulator=3", "block 3 is named as adapter and as emulator"),
        ("adapter=0,1-2-3 emulator=4", "neither an index nor a range"),
        ("adapter=0- emulator=4", "neither an index nor a range"),
        ("adapter=-3 emulator=4", "neither an index nor a range"),
        ("adapter=0,5-2 emulator=6", "neither an index nor a range"),
        ("adapter=0-99999999999 emulator=", "not in the full model"),
        ("adapter=0 emulator=0-99999999999", "not in the full model"),
        ("99999999999-0-0", "full model has 12"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(text: str, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        parse_plan(text, 12, uniform)


@given(plans())
def test_the_written_form_of_a_plan_reads_as_the_plan(plan: SplitPlan) -> None:
    def as_before(middle: Sequence[int], num_kept: int) -> tuple[int, ...]:
        assert tuple(middle) == plan.middle
        assert num_kept == len(plan.emulator)
        return plan.emulator

    assert parse_plan(plan.short, plan.num_blocks, as_before) == plan


@given(short_plans())
def test_a_short_plan_reads_back_as_it_was_written(numbers: tuple[int, int, int, int]) -> None:
    bottom, kept, top, num_blocks = numbers
    plan = parse_plan(f"{bottom}-{kept}-{top}", num_blocks, uniform)
    assert len(plan.adapter) == bottom + top
    assert len(plan.emulator) == kept
    assert parse_plan(plan.short, num_blocks, uniform) == plan
    if plan.middle:
        assert plan.short == f"{bottom}-{kept}-{top}"


@given(plans())
def test_segments_partition_the_middle(plan: SplitPlan) -> None:
    segments = plan.segments
    assert tuple(i for segment in segments for i in segment.blocks) == plan.middle
    assert tuple(i for segment in segments for i in segment.kept) == plan.emulator
    for segment in segments:
        first, last = segment.blocks[0], segment.blocks[-1]
        assert segment.blocks == tuple(range(first, last + 1))
        assert set(segment.kept) <= set(segment.blocks)
        # its neighbours are adapter blocks or the ends of the stack
        assert {first - 1, last + 1} <= {-1, plan.num_blocks, *plan.adapter}


@given(plans())
def test_kept_blocks_are_the_adapter_and_emulator_blocks_in_order(plan: SplitPlan) -> None:
    assert list(plan.kept) == sorted({*plan.adapter, *plan.emulator})
    assert sorted({*plan.adapter, *plan.middle}) == list(range(plan.num_blocks))
    assert plan.keeps_every_block == (plan.kept == tuple(range(plan.num_blocks)))


@given(plans(), st.booleans(), st.data())
def test_a_damaged_plan_is_refused(plan: SplitPlan, in_adapter: bool, data: st.DataObject) -> None:
    def with_blocks(blocks: Iterable[int]) -> SplitPlan:
        if in_adapter:
            return dataclasses.replace(plan, adapter=tuple(blocks))
        return dataclasses.replace(plan, emulator=tuple(blocks))

    blocks = plan.adapter if in_adapter else plan.emulator
    outside = data.draw(st.integers(-MAX_BLOCKS, -1) | st.integers(plan.num_blocks, 99))
    with pytest.raises(PlanError, match=f"{outside} is not in the full model"):
        with_blocks(sorted((*blocks, outside)))
    taken = data.draw(st.sampled_from(plan.kept))
    with pytest.raises(PlanError, match=r"each named once|as adapter and as emulator"):
        with_blocks(sorted((*blocks, taken)))
    if len(blocks) > 1:
        with pytest.raises(PlanError, match="ascending"):
            with_blocks(reversed(blocks))


@given(st.text(alphabet="0123456789-,= adptermulo", max_size=40), st.integers(1, 20))
def test_any_text_is_a_plan_or_refused(text: str, num_blocks: int) -> None:
    try:
        plan = parse_plan(text, num_blocks, uniform)
    except PlanError:
        return
    assert plan.adapter
    assert parse_plan(plan.short, num_blocks, lambda *_: plan.emulator) == plan
