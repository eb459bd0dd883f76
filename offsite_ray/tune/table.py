# SPDX-License-Identifier: Apache-2.0
"""The results as one table: a row a job, and the means of the rows of a point.

Every row of an emulator has what it is to be compared with beside it: the bound of its adapter
blocks, full fine-tuning and the full model, all of the same seed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from offsite_ray.bundle import atomic_file
from offsite_ray.evaluation.gaps import mean_score
from offsite_ray.results import SETTINGS
from offsite_ray.selection import SELECTION_METHODS
from offsite_ray.tune.folders import FAILED, FINISHED, STOPPED, Record
from offsite_ray.tune.plan import Job

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from offsite_ray.tune.plan import Planner

Row = dict[str, Any]

_TEXT, _WHOLE, _NUMBER, _FLAG = pa.string(), pa.int64(), pa.float64(), pa.bool_()

MEASURES = tuple(f"{setting}_{unit}" for setting in SETTINGS for unit in ("nats", "score"))
"""Columns of what was measured: nats per token, and the tasks' mean score, of each setting."""

GAPS = ("utility_gap", "bound_gap", "privacy_gap", "bound_share")

COLUMNS: dict[str, pa.DataType] = {
    "id": _TEXT,
    "point": _TEXT,
    "role": _TEXT,
    "control": _TEXT,
    "status": _TEXT,
    "error": _TEXT,
    "seed": _WHOLE,
    "plan": _TEXT,
    "select": _TEXT,
    "compress": _TEXT,
    "distill_steps": _WHOLE,
    "method": _TEXT,
    "learning_rate": _NUMBER,
    "num_blocks": _WHOLE,
    "num_adapter_blocks": _WHOLE,
    "num_emulator_blocks": _WHOLE,
    "depth": _WHOLE,
    "adapter_blocks": _TEXT,
    "emulator_blocks": _TEXT,
    "bundle_bytes": _WHOLE,
    "full_model_bytes": _WHOLE,
    "num_trained": _WHOLE,
    **dict.fromkeys(MEASURES, _NUMBER),
    **dict.fromkeys(GAPS, _NUMBER),
    "worth": _NUMBER,
    "on_front": _FLAG,
    "chosen": _FLAG,
    "gap_metric": _TEXT,
    "distill_loss": _NUMBER,
    "compress_seconds": _NUMBER,
    "distill_seconds": _NUMBER,
    "finetune_seconds": _NUMBER,
    "evaluate_seconds": _NUMBER,
    "seconds": _NUMBER,
    "peak_memory_bytes": _WHOLE,
    "settings": _TEXT,
    "measured": _TEXT,
    "data": _TEXT,
    "versions": _TEXT,
    "date": _TEXT,
}
"""Column to its type; docs/sweeps.md says what is in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The rows of a point, over its seeds."""

    point: str
    row: Row
    """The first row: what is the same for every seed."""
    seeds: tuple[int, ...]
    mean: Mapping[str, float | None]
    """Column to its mean over the seeds; None where one was not measured."""
    spread: Mapping[str, float | None]
    """Column to its standard deviation (of a sample); None for one seed."""
    num_stopped: int
    """Seeds that were stopped early."""
    num_failed: int

    @property
    def hands_all(self) -> bool:
        """Whether the bundle is the full model: nothing is dropped, and nothing compressed."""
        sizes = [self.row[f"num_{which}_blocks"] for which in ("adapter", "emulator")]
        every = None not in sizes and sum(sizes) == self.row["num_blocks"]
        return every and bool(self.row["compress"] == "none")

    @property
    def competes(self) -> bool:
        """Whether the point can be on the front and win.

        Where seeds were stopped or failed, the mean of the others is that of the lucky ones. The
        full model has no gap, and is not to be handed out.
        """
        return not (self.num_stopped or self.num_failed or self.hands_all)


def rows_of(records: Iterable[Record], planner: Planner) -> list[Row]:
    """Return a row for each record, those of emulators with their yardsticks beside them."""
    known = {record["id"]: record for record in records}
    return [_row(record, known, planner) for record in known.values()]


def records_of_bounds(
    jobs: Iterable[Job], records: Iterable[Record], planner: Planner
) -> list[Record]:
    """Return records of points' jobs that are not run, made of those of their bounds.

    Args:
        jobs: What ``Planner.not_run`` gave. One that has a record gets no other, and one whose
            bound was not measured gets none.
        records: All that there are.
        planner: Of the sweep.
    """
    known = {record["id"]: record for record in records}
    found = []
    for job in jobs:
        full, _, bound = (known.get(other.id) for other in yardsticks(job, planner))
        if job.id in known or bound is None or bound["status"] != FINISHED:
            continue
        measured = dict.fromkeys(("plug_in", "emulator_fine_tuned"), bound["measured"]["bound"])
        if full is not None and full["status"] == FINISHED:
            measured["emulator_zero_shot"] = full["measured"]["full_zero_shot"]
        own = {"id": job.id, "point": job.point, "job": job.to_plain()}
        found.append({**bound, **own, "measured": measured, "seconds": {}})
    return found


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as Parquet, whole or not at all."""
    schema = pa.schema(list(COLUMNS.items()))
    table = pa.Table.from_pylist(
        [{name: row.get(name) for name in COLUMNS} for row in rows], schema
    )
    with atomic_file(path) as tmp:
        pq.write_table(table, tmp)


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """Return the finished emulators by point, in the order in which they come."""
    points: dict[str, list[Row]] = {}
    ends: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if row["role"] == "emulator" and row["status"] == FINISHED:
            points.setdefault(row["point"], []).append(row)
        ends[row["point"], row["status"]] += 1
    return [_summary(point, found, ends) for point, found in points.items()]


def _summary(point: str, rows: list[Row], ends: Mapping[tuple[str, str], int]) -> Summary:
    mean: dict[str, float | None] = {}
    spread: dict[str, float | None] = {}
    for name, kind in COLUMNS.items():
        if kind in (_TEXT, _FLAG):
            continue
        values = [row.get(name) for row in rows]
        known = [float(value) for value in values if value is not None]
        whole = len(known) == len(rows)
        mean[name] = sum(known) / len(known) if whole else None
        spread[name] = _deviation(known) if whole else None
    rows = sorted(rows, key=lambda row: int(row["seed"]))
    seeds = tuple(int(row["seed"]) for row in rows)
    return Summary(
        point=point,
        row=rows[0],
        seeds=seeds,
        mean=mean,
        spread=spread,
        num_stopped=ends[point, STOPPED],
        num_failed=ends[point, FAILED],
    )


def _deviation(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _row(record: Record, known: Mapping[str, Record], planner: Planner) -> Row:
    job, found = Job.from_plain(record["job"]), record.get("found", {})
    settings, seconds = job.settings, record.get("seconds", {})
    compress, finetune = settings.get("compress", {}), settings.get("finetune", {})
    measured = dict(record.get("measured", {}))
    for yardstick in yardsticks(job, planner):
        measured |= known.get(yardstick.id, {}).get("measured", {})
    course = found.get("distillation") or []
    peaks = [found.get(f"{stage}_peak_memory_bytes") for stage in ("distill", "finetune")]
    row: Row = {
        "id": record["id"],
        "point": record["point"],
        "role": job.role,
        "control": job.control,
        "status": record["status"],
        "error": record["error"],
        "seed": job.seed,
        "plan": _plan(job, found, planner),
        "select": _selection(job),
        "compress": compress.get("compress", "none") if compress else None,
        "distill_steps": _distill_steps(job, course),
        "method": finetune.get("method", "full") if finetune or compress else None,
        "learning_rate": finetune.get("learning_rate"),
        "num_adapter_blocks": len(found["adapter"]) if "adapter" in found else None,
        "num_emulator_blocks": _num_emulator_blocks(job, found, planner),
        "depth": len(found["adapter"] + found["emulator"]) if "emulator" in found else None,
        "adapter_blocks": _joined(found.get("adapter")),
        "emulator_blocks": _joined(found.get("emulator")),
        **{
            n: found.get(n)
            for n in ("num_blocks", "bundle_bytes", "full_model_bytes", "num_trained")
        },
        **_measures(measured),
        "gap_metric": record.get("gap_metric"),
        "distill_loss": course[-1][1].get("loss") if course else None,
        **{f"{stage}_seconds": seconds.get(stage) for stage in _STAGES},
        "seconds": seconds.get("all"),
        "peak_memory_bytes": max((peak for peak in peaks if peak), default=None),
        "settings": json.dumps(job.to_plain()["settings"], sort_keys=True),
        "measured": json.dumps(record.get("measured", {})),
        "data": json.dumps({n: found.get(n) for n in ("private_data", "public_data")}),
        "versions": json.dumps(record.get("versions", {})),
        "date": record["date"],
    }
    return {**row, **_gaps(row)}


_STAGES = ("compress", "distill", "finetune", "evaluate")


def yardsticks(job: Job, planner: Planner) -> list[Job]:
    """Return the jobs that one of an emulator is compared with; none for others."""
    if job.role != "emulator":
        return []
    return planner.yardsticks(job.settings, job.seed)


def _selection(job: Job) -> str | None:
    compress = job.settings.get("compress")
    if compress is None:
        return None
    if "emulator=" in str(compress["plan"]) and not _keeps_depth(compress):
        return job.control or "explicit"
    return str(compress.get("select", "uniform"))


def _keeps_depth(compress: Mapping[str, Any]) -> bool:
    """Return whether something stands in the place of the blocks that are dropped."""
    method = SELECTION_METHODS.get(str(compress.get("select", "uniform")))
    return method is not None and method.keeps_depth


def _plan(job: Job, found: Mapping[str, Any], planner: Planner) -> str | None:
    """Return the plan by which the verbs make it: short where it can be.

    The bundle of an emulator that keeps the depth has every block, and its plan names them all.
    """
    compress = job.settings.get("compress", {})
    if not compress:
        return None
    given = str(compress["plan"])
    if not _keeps_depth(compress):
        return str(found.get("plan") or given)
    plan = planner.resolved(compress)
    # Who names the blocks, or spreads the adapter, says more than the numbers do.
    return given if "emulator=" in given or len(plan.segments) > 1 else plan.short


def _num_emulator_blocks(job: Job, found: Mapping[str, Any], planner: Planner) -> int | None:
    """Return how many blocks of the middle are kept; copies and harmonizers do not count."""
    if "emulator" not in found:
        return None
    compress = job.settings["compress"]
    kept = planner.resolved(compress).emulator if _keeps_depth(compress) else found["emulator"]
    return len(kept)


def _distill_steps(job: Job, course: Sequence[Any]) -> Any:
    if job.role != "emulator":
        return None
    return (
        course[-1][0] if course else job.settings.get("distill", {"max_steps": 0}).get("max_steps")
    )


def _joined(indices: Sequence[int] | None) -> str | None:
    return None if indices is None else ",".join(map(str, indices))


def _measures(measured: Mapping[str, Any]) -> Row:
    found: Row = {}
    for setting in SETTINGS:
        result = measured.get(setting) or {}
        found[f"{setting}_nats"] = result.get("nats_per_token")
        found[f"{setting}_score"] = mean_score(result.get("tasks", {}).values())
    return found


def quality(row: Mapping[str, Any], setting: str) -> float | None:
    """Return how good a setting is in a row, higher is better: in nats, or else in scores."""
    nats: float | None = row.get(f"{setting}_nats")
    score: float | None = row.get(f"{setting}_score")
    return score if nats is None else -nats


def _gaps(row: Row) -> Row:
    good = {setting: quality(row, setting) for setting in SETTINGS}

    def ahead(better: str, worse: str) -> float | None:
        first, second = good[better], good[worse]
        return None if first is None or second is None else first - second

    possible, reached = ahead("bound", "full_zero_shot"), ahead("plug_in", "full_zero_shot")
    share = None if not possible or reached is None or possible <= 0 else reached / possible
    return {
        "utility_gap": ahead("full_fine_tuned", "plug_in"),
        "bound_gap": ahead("bound", "plug_in"),
        "privacy_gap": ahead("plug_in", "emulator_fine_tuned"),
        "bound_share": share,
    }
