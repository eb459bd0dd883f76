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
    """Return what points are measured against, the same for all: a setting.

    It is the bound, or full fine-tuning where no bound is known at all.
    """
    known = any(quality(point.mean, "bound") is not None for point in points)
    return "bound" if known else "full_fine_tuned"


def behind(points: Sequence[Summary]) -> dict[str, float | None]:
    """Return by point how far its plug-in is behind the best bound of the sweep.

    Not behind its own: with a fine-tuning that learns nothing it would have lost nothing either.
    None where the plug-in is not known, or no bound (and no full fine-tuning).
    """
    setting = yardstick(points)
    marks = [value for point in points if (value := quality(point.mean, setting)) is not None]
    reached = {point.point: quality(point.mean, "plug_in") for point in points}
    if not marks:
        return dict.fromkeys(reached)
    return {name: None if own is None else max(marks) - own for name, own in reached.items()}


def worth(utility: float | None, privacy: float | None, privacy_weight: float) -> float | None:
    """Return what a model owner has of a point, higher is better; None where a gap is unknown.

    ``privacy_weight * privacy gap - (1 - privacy_weight) * utility gap``.

    Args:
        utility: How far the plug-in is :func:`behind`.
        privacy: Its privacy gap.
        privacy_weight: 0 to 1.
    """
    if utility is None or privacy is None:
        return None
    return privacy_weight * privacy - (1 - privacy_weight) * utility


def worths(points: Sequence[Summary], privacy_weight: float) -> dict[str, float | None]:
    """Return by point what it is worth; None of one that does not compete."""
    gaps = behind(points)
    return {
        point.point: worth(gaps[point.point], point.mean["privacy_gap"], privacy_weight)
        if point.competes
        else None
        for point in points
    }


def chosen(
    points: Sequence[Summary], objectives: Sequence[str], privacy_weight: float
) -> Summary | None:
    """Return the winner: the best in a single objective, or of the front the one worth most.

    Of equals it is the one that was asked for rather than a control, and the smaller.
    """
    worth_of = worths(points, privacy_weight)
    rated = [
        ((value, point.row["control"] is None, -(point.row["bundle_bytes"] or 0)), point)
        for point in front(points, objectives)
        if (value := worth_of[point.point] if len(objectives) > 1 else _only(point, objectives))
        is not None
    ]
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
    method: str
    """Of fine-tuning."""
    utility_gap: float | None
    """To full fine-tuning; mean over the seeds, as are the others."""
    bound_gap: float | None
    """To the bound."""
    privacy_gap: float | None
    worth: float | None
    """For the privacy weight of the sweep; None where a gap is unknown, or it does not compete."""


def how_much_to_distil(points: Sequence[Summary], privacy_weight: float) -> list[Distilled]:
    """Return both gaps over emulator size and steps of distillation, in this order."""
    worth_of = worths(points, privacy_weight)
    found = [
        Distilled(
            point=point.point,
            num_emulator_blocks=int(point.row["num_emulator_blocks"]),
            distill_steps=int(point.row["distill_steps"] or 0),
            plan=point.row["plan"],
            select=point.row["select"],
            compress=point.row["compress"],
            method=point.row["method"],
            utility_gap=point.mean["utility_gap"],
            bound_gap=point.mean["bound_gap"],
            privacy_gap=point.mean["privacy_gap"],
            worth=worth_of[point.point],
        )
        for point in sorted(points, key=lambda point: point.row["control"] is not None)
    ]
    return sorted(found, key=lambda row: (row.num_emulator_blocks, row.distill_steps))


def most_worth(rows: Sequence[Distilled]) -> Distilled | None:
    """Return the setting of the knob that is worth most for the given weight."""
    rated = [(row.worth, row) for row in rows if row.worth is not None]
    return max(rated, key=lambda pair: pair[0])[1] if rated else None
