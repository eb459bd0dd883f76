# SPDX-License-Identifier: Apache-2.0
"""Split plans: which blocks are adapter blocks, and which of the others the emulator keeps.

Plain integers only. All indices are absolute positions in the full model, so that a plan written by
the model owner means the same to the data owner.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offsite_ray.errors import PlanError, unknown_name

SelectPositions = Callable[[Sequence[int], int], Sequence[int]]
"""A selection method: ``(middle, num_kept) -> kept``, absolute indices in ascending order."""

_SHORT = re.compile(r"(\d+)-(\d+)-(\d+)")
_EXPLICIT = re.compile(r"adapter=([\d,\-]*)\s+emulator=([\d,\-]*)")
_NUMBERED = re.compile(r"([a-z]+)=([\d,\-]+)\s+keep=(\d+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def _bottom(num_blocks: int, count: int) -> list[int]:
    return list(range(count))


def _top(num_blocks: int, count: int) -> list[int]:
    return list(range(num_blocks - count, num_blocks))


def _both(num_blocks: int, count: int) -> list[int]:
    """Half of them at the bottom, half at the top; of an odd number the one more at the bottom."""
    return [*_bottom(num_blocks, count - count // 2), *_top(num_blocks, count // 2)]


def _spread(num_blocks: int, count: int) -> list[int]:
    """Evenly over the depth, both ends among them."""
    if count == 1:
        return [(num_blocks - 1) // 2]
    return [round(i * (num_blocks - 1) / (count - 1)) for i in range(count)]


PLACEMENTS: dict[str, Callable[[int, int], list[int]]] = {
    "bottom": _bottom,
    "top": _top,
    "both": _both,
    "spread": _spread,
}
"""Where adapter blocks may lie, by the word of a plan: ``(num_blocks, count) -> indices``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A run of neighbouring middle blocks between two adapter blocks (or an end of the stack)."""

    blocks: tuple[int, ...]
    """Absolute indices of every block of the run, ascending and contiguous."""
    kept: tuple[int, ...]
    """The ones of ``blocks`` that the emulator keeps, ascending; may be empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitPlan:
    """Which blocks are trained by the data owner and which the emulator keeps of the rest."""

    num_blocks: int
    """Blocks in the full model."""
    adapter: tuple[int, ...]
    """Absolute indices of the adapter blocks, ascending."""
    emulator: tuple[int, ...] = ()
    """Absolute indices of the blocks that the emulator keeps, ascending."""

    def __post_init__(self) -> None:
        """Check that the indices make a plan; raise :class:`PlanError` otherwise."""
        if not self.adapter:
            raise PlanError(
                "the plan has no adapter block, so there is nothing to train; name at least one, "
                "e.g. '1-2-1' or 'adapter=0,7 emulator=2,4'"
            )
        for role, indices in (("adapter", self.adapter), ("emulator", self.emulator)):
            if list(indices) != sorted(set(indices)):
                raise PlanError(f"{role} blocks {list(indices)} must be ascending, each named once")
            outside = [i for i in indices if not 0 <= i < self.num_blocks]
            if outside:
                raise PlanError(
                    f"{role} block {outside[0]} is not in the full model, which has "
                    f"{self.num_blocks} blocks (0 to {self.num_blocks - 1})"
                )
        both = sorted(set(self.adapter) & set(self.emulator))
        if both:
            raise PlanError(f"block {both[0]} is named as adapter and as emulator; choose one")

    @property
    def middle(self) -> tuple[int, ...]:
        """Blocks of the full model that the emulator stands in for, ascending."""
        adapter = set(self.adapter)
        return tuple(i for i in range(self.num_blocks) if i not in adapter)

    @property
    def kept(self) -> tuple[int, ...]:
        """Blocks of the emulator model in order: position ``j`` holds block ``kept[j]``."""
        return tuple(sorted((*self.adapter, *self.emulator)))

    @property
    def keeps_every_block(self) -> bool:
        """Whether the emulator model is the full model: the plan of the bound."""
        return len(self.kept) == self.num_blocks

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The middle as runs of neighbouring blocks, in order; none is empty."""
        runs: list[list[int]] = []
        for index in self.middle:
            if runs and runs[-1][-1] == index - 1:
                runs[-1].append(index)
            else:
                runs.append([index])
        kept = set(self.emulator)
        return tuple(
            Segment(blocks=tuple(run), kept=tuple(i for i in run if i in kept)) for run in runs
        )

    @property
    def short(self) -> str:
        """``2-8-2`` where the adapter blocks are a bottom and a top run, else the explicit form."""
        segments = self.segments
        if len(segments) == 1:
            bottom, top = segments[0].blocks[0], self.num_blocks - 1 - segments[0].blocks[-1]
            return f"{bottom}-{len(self.emulator)}-{top}"
        return self.spelled_out

    @property
    def spelled_out(self) -> str:
        """``adapter=0,1,7 emulator=2,4``: every index, whoever selected it."""
        return f"adapter={_join(self.adapter)} emulator={_join(self.emulator)}"


def parse_plan(text: str, num_blocks: int, select: SelectPositions) -> SplitPlan:
    """Resolve the text of a plan against a full model.

    Args:
        text: ``"2-8-2"`` (bottom adapter blocks, emulator blocks, top adapter blocks),
            ``"spread=4 keep=8"`` (adapter blocks by a word of ``PLACEMENTS``, emulator blocks),
            ``"adapter=0,8,17,31 keep=8"``, or ``"adapter=0,8,17,31 emulator=1,3,5"``; ``4-6``
            stands for ``4,5,6``.
        num_blocks: Blocks in the full model.
        select: Chooses the kept blocks of the middle where the plan only has their number.

    Raises:
        PlanError: The text is no plan, or the full model cannot follow it.
    """
    if match := _SHORT.fullmatch(text.strip()):
        bottom, num_kept, top = (int(group) for group in match.groups())
        if bottom + num_kept + top > num_blocks:
            raise PlanError(
                f"plan {text!r} needs {bottom + num_kept + top} blocks, the full model has "
                f"{num_blocks}; make the three numbers sum to at most {num_blocks}"
            )
        adapter = (*range(bottom), *range(num_blocks - top, num_blocks))
        return _selected(adapter, num_kept, num_blocks, select)
    if match := _NUMBERED.fullmatch(text.strip()):
        adapter = _placed(match[1], match[2], text, num_blocks)
        num_kept = int(match[3])
        # The indices are checked before anybody selects by them.
        rest = num_blocks - len(SplitPlan(num_blocks=num_blocks, adapter=adapter).adapter)
        if num_kept > rest:
            raise PlanError(
                f"plan {text!r} keeps {num_kept} blocks, and beside the adapter blocks the full "
                f"model has {rest}; keep at most {rest}"
            )
        return _selected(adapter, num_kept, num_blocks, select)
    if match := _EXPLICIT.fullmatch(text.strip()):
        adapter, emulator = (_indices(group, text, num_blocks) for group in match.groups())
        return SplitPlan(num_blocks=num_blocks, adapter=adapter, emulator=emulator)
    raise PlanError(
        f"plan {text!r} is of none of the forms '2-8-2', 'spread=4 keep=8', "
        "'adapter=0,1,30,31 keep=8' and 'adapter=0,1,30,31 emulator=2,5-9'"
    )


def _selected(
    adapter: tuple[int, ...], num_kept: int, num_blocks: int, select: SelectPositions
) -> SplitPlan:
    empty = SplitPlan(num_blocks=num_blocks, adapter=adapter)
    return SplitPlan(
        num_blocks=num_blocks, adapter=adapter, emulator=tuple(select(empty.middle, num_kept))
    )


def _placed(word: str, given: str, text: str, num_blocks: int) -> tuple[int, ...]:
    """Return the adapter blocks that a plan spells out, or places by a word and their number."""
    if word == "adapter":
        return _indices(given, text, num_blocks)
    if word not in PLACEMENTS:
        raise PlanError(unknown_name("placement", word, ("adapter", *PLACEMENTS)))
    if not given.isdigit() or not 1 <= int(given) <= num_blocks:
        raise PlanError(
            f"plan {text!r} places {given} adapter blocks, and the full model has {num_blocks}; "
            f"give a number from 1 to {num_blocks}"
        )
    return tuple(PLACEMENTS[word](num_blocks, int(given)))


def _join(indices: tuple[int, ...]) -> str:
    return ",".join(str(index) for index in indices)


def _indices(group: str, text: str, num_blocks: int) -> tuple[int, ...]:
    """Return the indices of one comma-separated list, ranges spelled out."""
    found: list[int] = []
    for part in filter(None, group.split(",")):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise PlanError(f"{part!r} in plan {text!r} is neither an index nor a range like 4-6")
        # One block beyond the end is enough for a plan to be refused.
        found.extend(range(first, min(last, max(first, num_blocks)) + 1))
    return tuple(found)
