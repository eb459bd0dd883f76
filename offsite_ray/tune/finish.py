# SPDX-License-Identifier: Apache-2.0
"""The end of a sweep: its table, its page, its winner, and what it says in short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offsite_ray.tune.emulators import discard_stopped
from offsite_ray.tune.folders import FAILED, FINISHED, STOPPED
from offsite_ray.tune.front import chosen, front, how_much_to_distil, most_worth, worths
from offsite_ray.tune.recipe import prune_bundles, write_winner
from offsite_ray.tune.table import records_of_bounds, rows_of, summaries, write_table
from offsite_ray.tune.words import in_words, knob_in_words, other_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offsite_ray.tune.front import Distilled
    from offsite_ray.tune.planned import Sweep
    from offsite_ray.tune.table import Row, Summary


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """What a sweep found."""

    out: str
    table: str
    report: str
    num_finished: int
    """Jobs that were measured, controls and yardsticks among them."""
    num_stopped: int
    """Jobs that were stopped early."""
    num_failed: int
    front: tuple[str, ...]
    """Points that no other is better than in every objective, in words."""
    front_points: tuple[str, ...]
    """The same by the name that the table's column ``point`` has."""
    winner: str | None
    """The point that a model owner would choose, in words."""
    winner_point: str | None
    """The same by the name that the table has."""
    recipe: str | None
    """Directory of the winner's bundle and recipe."""
    plug_in: float | None
    """Of the winner, mean over the seeds: nats per token, or the mean task score."""
    utility_gap: float | None
    """Of the winner, to full fine-tuning."""
    bound_gap: float | None
    """Of the winner, to the bound."""
    privacy_gap: float | None
    distillation: tuple[Distilled, ...]
    """Both gaps over emulator size and steps of distillation."""
    distil: str | None
    """The setting of it that is worth most for the privacy weight, in words."""
    seconds: float


def finish(planned: Sweep, seconds: float, *, whole: bool = True, ran: bool = True) -> SweepResult:
    """Write table, report and winner of what there is, and return it in short.

    Args:
        planned: The sweep.
        seconds: What it took.
        whole: Whether it came to its end; else nothing is made that takes long.
        ran: Whether a job was run; else no bundle is removed: somebody only looks at what there is,
            perhaps for other objectives.
    """
    from offsite_ray.tune.page import write_page

    config, folders = planned.config, planned.folders
    records = planned.records()
    not_run = planned.planner.not_run(planned.points())
    of_bounds = records_of_bounds(not_run, records, planned.planner)
    rows = rows_of([*records, *of_bounds], planned.planner)
    points = summaries(rows)
    best = front(points, config.objectives)
    winner = chosen(points, config.objectives, config.privacy_weight)
    worth_of = worths(points, config.privacy_weight)
    write_table(folders.table, [_judged(row, worth_of, best, winner) for row in rows])
    write_page(folders.report, config, rows, points, best, winner)
    if ran and not config.keep_bundles:
        ended = {record["id"] for record in records}
        wanted = [job for job in planned.jobs() if job.id not in ended]
        prune_bundles(folders, records, best, wanted)
    discard_stopped(folders)
    recipe = None
    if winner is not None:
        recipe = write_winner(folders, winner, config, planned.shared, may_make=whole)
    others = other_settings([point.row for point in points])
    words = {
        point.point: in_words(point.row, other) for point, other in zip(points, others, strict=True)
    }
    statuses = [record["status"] for record in records]
    mean = winner.mean if winner is not None else {}
    knob = how_much_to_distil(points, config.privacy_weight)
    best_knob = most_worth(knob)
    plug_in = mean.get("plug_in_nats")
    return SweepResult(
        out=str(folders.root),
        table=str(folders.table),
        report=str(folders.report),
        num_finished=statuses.count(FINISHED),
        num_stopped=statuses.count(STOPPED),
        num_failed=statuses.count(FAILED),
        front=tuple(words[point.point] for point in best),
        front_points=tuple(point.point for point in best),
        winner=None if winner is None else words[winner.point],
        winner_point=None if winner is None else winner.point,
        recipe=None if recipe is None else str(recipe),
        plug_in=mean.get("plug_in_score") if plug_in is None else plug_in,
        utility_gap=mean.get("utility_gap"),
        bound_gap=mean.get("bound_gap"),
        privacy_gap=mean.get("privacy_gap"),
        distillation=tuple(knob),
        distil=None if best_knob is None else knob_in_words(best_knob),
        seconds=seconds,
    )


def _judged(
    row: Row, worth_of: Mapping[str, float | None], best: Sequence[Summary], winner: Summary | None
) -> Row:
    """Return a row with what the point is worth beside the others."""
    if row["role"] != "emulator":
        return row
    return row | {
        "worth": worth_of.get(row["point"]),
        "on_front": any(row["point"] == point.point for point in best),
        "chosen": winner is not None and row["point"] == winner.point,
    }
