# SPDX-License-Identifier: Apache-2.0
"""Selection methods: which blocks of the middle the emulator keeps. One row per method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from offsite_ray.errors import PlanError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Mapping, Sequence


class Signals(Protocol):
    """What the full model says of its blocks on some text; asked for only where it is needed."""

    def influence(self, block: int) -> float:
        """Return how much a block changes the hidden states: 0, not at all, to 2."""

    def distance(self, first: int, count: int) -> float:
        """Return the angle, as a share of 180 degrees, across ``count`` blocks from ``first``."""

    def alignment(self, a: int, b: int) -> float:
        """Return how alike what two blocks return is: 0 to 1."""

    def loss(self, dropped: Collection[int]) -> float:
        """Return the loss of the full model without some of its blocks, in nats a token."""

    def scores(self, middle: Sequence[int], num_kept: int) -> Mapping[int, float]:
        """Return what it is worth to keep each block, rather than a harmonizer in its place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionMethod:
    """One way to select."""

    name: str
    source: str
    choose: Callable[[Sequence[int], int, Any], Sequence[int]]
    """``(middle, num_kept, signals) -> kept``: absolute indices in ascending order; the signals,
    :class:`Signals`, are None where the method needs none."""
    needs_text: bool = False
    """Whether it asks the signals, which takes text to run the full model on."""
    shares: bool = False
    """Whether a dropped block is replaced by a copy of the nearest kept one."""
    replaces: bool = False
    """Whether a dropped block is replaced by a harmonizer, which is trained on the text."""

    @property
    def keeps_depth(self) -> bool:
        """Whether something stands in the place of each dropped block."""
        return self.shares or self.replaces


def uniform(middle: Sequence[int], num_kept: int, _: object = None) -> list[int]:
    """Return ``num_kept`` evenly spaced blocks of ``middle``, both ends included.

    Block ``round(i * (n - 1) / (num_kept - 1))`` of the ``n`` middle blocks, rounding half to
    even. One kept block is the one in the centre, where the paper's formula divides by zero.
    """
    if num_kept == 0:
        return []
    if num_kept == 1:
        return [middle[(len(middle) - 1) // 2]]
    stride = (len(middle) - 1) / (num_kept - 1)
    return [middle[round(i * stride)] for i in range(num_kept)]


def tail(middle: Sequence[int], num_kept: int, _: object = None) -> list[int]:
    """Return the first ``num_kept`` blocks: what is dropped is the end of the middle."""
    return list(middle[:num_kept])


def block_influence(middle: Sequence[int], num_kept: int, signals: Signals) -> list[int]:
    """Return the blocks that change the hidden states most, ``1 - E[cos(h_i, h_(i+1))]``."""
    return highest({block: signals.influence(block) for block in middle}, num_kept)


def highest(scores: Mapping[int, float], count: int) -> list[int]:
    """Return the blocks with the highest scores, ascending; of equals, the lower ones."""
    return sorted(sorted(scores, key=lambda block: (-scores[block], block))[:count])


def angular(middle: Sequence[int], num_kept: int, signals: Signals) -> list[int]:
    """Drop the one run of neighbouring blocks across which the last token's state turns least.

    Raises:
        PlanError: Adapter blocks cut the middle into runs that are all too short.
    """
    count = len(middle) - num_kept
    if count == 0:
        return list(middle)
    starts = [
        middle[i]
        for i in range(len(middle) - count + 1)
        if middle[i + count - 1] - middle[i] == count - 1
    ]
    if not starts:
        raise PlanError(
            f"angular drops {count} neighbouring blocks, and the adapter blocks leave no such run; "
            "keep more blocks, or select by another method"
        )
    first = min(starts, key=lambda start: (signals.distance(start, count), start))
    return [block for block in middle if not first <= block < first + count]


def cka_cluster(middle: Sequence[int], num_kept: int, signals: Signals) -> list[int]:
    """Return the centre of each of ``num_kept`` clusters of neighbouring blocks.

    Every block begins as a cluster; the two neighbours of which the last block of the one and the
    first of the other return what is most alike, by linear CKA, become one.
    """
    clusters = [[block] for block in middle]
    if num_kept == 0:
        return []
    while len(clusters) > num_kept:
        at = max(
            range(len(clusters) - 1),
            key=lambda i: (signals.alignment(clusters[i][-1], clusters[i + 1][0]), -i),
        )
        clusters[at : at + 2] = [clusters[at] + clusters[at + 1]]
    return [cluster[len(cluster) // 2] for cluster in clusters]


def greedy(middle: Sequence[int], num_kept: int, signals: Signals) -> list[int]:
    """Drop, one after the other, the block without which the loss on the text is least."""
    dropped: list[int] = []
    while len(dropped) < len(middle) - num_kept:
        left = [block for block in middle if block not in dropped]
        without = {block: signals.loss([*dropped, block]) for block in left}
        dropped.append(min(left, key=lambda block: (without[block], block)))
    return [block for block in middle if block not in dropped]


def layer_replace(middle: Sequence[int], num_kept: int, signals: Signals) -> list[int]:
    """Return the blocks with the highest learnt scores; harmonizers stand for the others."""
    if num_kept == len(middle):
        return list(middle)
    return highest(signals.scores(middle, num_kept), num_kept)


def _explicit(middle: Sequence[int], num_kept: int, _: object = None) -> list[int]:
    raise PlanError(
        f"explicit selects nothing by itself: name the {num_kept} of {len(middle)} blocks in the "
        "plan, as 'adapter=0,7 emulator=2,4'"
    )


SELECTION_METHODS: dict[str, SelectionMethod] = {
    row.name: row
    for row in (
        SelectionMethod(
            name="uniform", source="Xiao et al., arXiv 2302.04870, 3.2", choose=uniform
        ),
        SelectionMethod(name="tail", source="control of Lu et al., arXiv 2411.15558", choose=tail),
        SelectionMethod(
            name="block_influence",
            source="ShortGPT, Men et al., arXiv 2403.03853, eq. 1",
            choose=block_influence,
            needs_text=True,
        ),
        SelectionMethod(
            name="angular",
            source="Gromov et al., arXiv 2403.17887, eq. 7",
            choose=angular,
            needs_text=True,
        ),
        SelectionMethod(
            name="cka_cluster",
            source="CRaSh without sharing, Zhang et al., arXiv 2310.15477",
            choose=cka_cluster,
            needs_text=True,
        ),
        SelectionMethod(
            name="cka_cluster_shared",
            source="CRaSh, Zhang et al., arXiv 2310.15477",
            choose=cka_cluster,
            needs_text=True,
            shares=True,
        ),
        SelectionMethod(
            name="greedy",
            source="SLEB, Song et al., arXiv 2402.09025",
            choose=greedy,
            needs_text=True,
        ),
        SelectionMethod(
            name="layer_replace",
            source="ScaleOT, Yao et al., arXiv 2412.09812, dynamic layer replacement",
            choose=layer_replace,
            needs_text=True,
            replaces=True,
        ),
        SelectionMethod(name="explicit", source="the plan itself", choose=_explicit),
    )
}
"""Every selection method by the name that ``--select`` takes."""


def selection_method(name: str) -> SelectionMethod:
    """Return the method of that name; raise :class:`PlanError` for any other."""
    if name not in SELECTION_METHODS:
        raise PlanError(unknown_name("selection method", name, SELECTION_METHODS))
    return SELECTION_METHODS[name]


def nearest_kept(kinds: Sequence[Hashable], kept: Collection[int]) -> Mapping[int, int]:
    """Return which kept block is nearest to each block; of two, the upper one, as in CRaSh.

    Args:
        kinds: Kind of every block; one can only stand for another of its kind.
        kept: Absolute indices.

    Raises:
        ValueError: No block of some kind is kept.
    """
    nearest = {}
    for block, kind in enumerate(kinds):
        alike = [other for other in kept if kinds[other] == kind]
        if not alike:
            raise ValueError(f"no block of the kind {kind!r} is kept that block {block} could copy")
        nearest[block] = min(alike, key=lambda other: (abs(other - block), -other))
    return nearest
