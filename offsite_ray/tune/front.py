# SPDX-License-Identifier: Apache-2.0
"""Which points are worth having: the Pareto front, and the one that an owner would choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offsite_ray.tune.table import Summary, quality

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Something that a sweep is for."""

    name: str
    label: str
    higher: bool
    """Whether more is better."""
    value: Callable[[Mapping[str, float | None]], float | None]
    """Of the columns of a row, or of their means."""


OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        Objective(
            name="plug_in",
            label="quality of the plug-in",
            higher=True,
            value=lambda row: quality(row, "plug_in"),
        ),
        Objective(
            name="emulator",
            label="quality of the emulator, fine-tuned",
            higher=False,
            value=lambda row: quality(row, "emulator_fine_tuned"),
        ),
        Objective(
            name="bytes",
            label="bytes shipped",
            higher=False,
            value=lambda row: row.get("bundle_bytes"),
        ),
    )
}
"""Every objective by the name that ``objectives`` takes."""


def scores(row: Mapping[str, float | None], objectives: Sequence[str]) -> tuple[float, ...] | None:
    """Return the objectives of a row, each so that higher is better; None where one is unknown."""
    found = []
    for name in objectives:
        objective = OBJECTIVES[name]
        value = objective.value(row)
        if value is None:
            return None
        found.append(float(value) if objective.higher else -float(value))
    return tuple(found)


def front(points: Sequence[Summary], objectives: Sequence[str]) -> list[Summary]:
    """Return the points that no other is better than, in their order.

    One is better than another where it is as good in every objective and better in one. A point
    that does not compete is none.
    """
    known = [(point, scores(point.mean, objectives)) for point in points if point.competes]
    return [
        point
        for point, own in known
        if own is not None
        and not any(dominates(other, own) for _, other in known if other is not None)
    ]


def dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    """Return whether the first is as good everywhere and better somewhere; higher is better."""
    pairs = list(zip(first, second, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def yardstick(points: Sequence[Summary]) -> str:
    """Return the column of the utility gap that points are compared by, the same for all.

    It is that to the bound, or to full fine-tuning where no bound is known at all: a point whose
    own bound failed would be judged by another measure than its rivals.
    """
    known = any(point.mean["bound_gap"] is not None for point in points)
    return "bound_gap" if known else "utility_gap"


def worth(
    row: Mapping[str, float | None], privacy_weight: float, utility_gap: str = "bound_gap"
) -> float | None:
    """Return what a model owner has of a point, higher is better; None where a gap is unknown.

    ``privacy_weight * privacy gap - (1 - privacy_weight) * utility gap``.

    Args:
        row: Means of a point.
        privacy_weight: 0 to 1.
        utility_gap: Column that :func:`yardstick` gave for all that are compared.
    """
    utility, privacy = row.get(utility_gap), row.get("privacy_gap")
    if utility is None or privacy is None:
        return None
    return privacy_weight * privacy - (1 - privacy_weight) * utility


def chosen(
    points: Sequence[Summary], objectives: Sequence[str], privacy_weight: float
) -> Summary | None:
    """Return the winner: the best in a single objective, or of the front the one worth most."""
    candidates = front(points, objectives)
    utility = yardstick(candidates)
    values = (
        worth(point.mean, privacy_weight, utility)
        if len(objectives) > 1
        else _only(point, objectives)
        for point in candidates
    )
    rated = [(v, point) for v, point in zip(values, candidates, strict=True) if v is not None]
    return max(rated, key=lambda pair: pair[0])[1] if rated else None


def _only(point: Summary, objectives: Sequence[str]) -> float | None:
    found = scores(point.mean, objectives)
    return None if found is None else found[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Distilled:
    """Both gaps of an emulator size after some steps of distillation: one setting of the knob."""

    point: str
    num_emulator_blocks: int
    distill_steps: int
    plan: str
    select: str
    compress: str
    utility_gap: float | None
    """To full fine-tuning; mean over the seeds, as are the others."""
    bound_gap: float | None
    """To the bound."""
    privacy_gap: float | None
    worth: float | None
    """For the privacy weight of the sweep; None where a gap is unknown, or it does not compete."""


def how_much_to_distil(points: Sequence[Summary], privacy_weight: float) -> list[Distilled]:
    """Return both gaps over emulator size and steps of distillation, in this order."""
    utility = yardstick(points)
    found = [
        Distilled(
            point=point.point,
            num_emulator_blocks=int(point.row["num_emulator_blocks"]),
            distill_steps=int(point.row["distill_steps"] or 0),
            plan=point.row["plan"],
            select=point.row["select"],
            compress=point.row["compress"],
            utility_gap=point.mean["utility_gap"],
            bound_gap=point.mean["bound_gap"],
            privacy_gap=point.mean["privacy_gap"],
            worth=worth(point.mean, privacy_weight, utility) if point.competes else None,
        )
        for point in points
    ]
    return sorted(found, key=lambda row: (row.num_emulator_blocks, row.distill_steps))


def most_worth(rows: Sequence[Distilled]) -> Distilled | None:
    """Return the setting of the knob that is worth most for the given weight."""
    rated = [(row.worth, row) for row in rows if row.worth is not None]
    return max(rated, key=lambda pair: pair[0])[1] if rated else None
