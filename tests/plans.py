# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for split plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from offsite_ray.split import SplitPlan

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

MAX_BLOCKS = 40


@st.composite
def plans(draw: DrawFn) -> SplitPlan:
    """Draw any plan: each block is an adapter block, an emulator block or dropped."""
    roles = draw(st.lists(st.sampled_from("aed"), min_size=1, max_size=MAX_BLOCKS))
    if "a" not in roles:
        roles[draw(st.integers(0, len(roles) - 1))] = "a"
    return SplitPlan(
        num_blocks=len(roles),
        adapter=tuple(i for i, role in enumerate(roles) if role == "a"),
        emulator=tuple(i for i, role in enumerate(roles) if role == "e"),
    )


@st.composite
def short_plans(draw: DrawFn) -> tuple[int, int, int, int]:
    """Draw ``(bottom, kept, top, number of blocks)`` of a plan that has an adapter block."""
    num_blocks = draw(st.integers(1, MAX_BLOCKS))
    bottom = draw(st.integers(0, num_blocks))
    top = draw(st.integers(0 if bottom else 1, num_blocks - bottom)) if bottom < num_blocks else 0
    kept = draw(st.integers(0, num_blocks - bottom - top))
    return bottom, kept, top, num_blocks
