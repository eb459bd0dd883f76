# SPDX-License-Identifier: Apache-2.0
"""A sweep from its configuration to its results."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.bundle import alone, check_parent
from offsite_ray.data import is_prepared, open_prepared, write_blocks
from offsite_ray.errors import ConfigError, TrainingError
from offsite_ray.tune.attempts import run_one_by_one
from offsite_ray.tune.bench import Shared
from offsite_ray.tune.checks import check_same, workers_per_trial
from offsite_ray.tune.emulators import discard_stopped
from offsite_ray.tune.folders import (
    FAILED,
    FINISHED,
    STOPPED,
    Folders,
    once,
)
from offsite_ray.tune.front import (
    chosen,
    front,
    how_much_to_distil,
    most_worth,
    scores,
    worths,
)
from offsite_ray.tune.halving import Halving
from offsite_ray.tune.opening import open_sweep, points_of
from offsite_ray.tune.recipe import PrunedToo, prune_bundles, write_winner
from offsite_ray.tune.search import Listed, Suggested, asked_points
from offsite_ray.tune.table import records_of_bounds, rows_of, summaries, write_table
from offsite_ray.tune.tensorboard import TensorBoardToo
from offsite_ray.tune.words import in_words, knob_in_words, other_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from offsite_ray.architectures import Notice
    from offsite_ray.config import SweepConfig
    from offsite_ray.tune.attempts import Watch
    from offsite_ray.tune.folders import Record
    from offsite_ray.tune.front import Distilled
    from offsite_ray.tune.plan import Job, Planner
    from offsite_ray.tune.search import Source
    from offsite_ray.tune.space import Point, Variant
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A sweep that is planned: its points are known but for those that Optuna is yet to ask for."""

    config: SweepConfig
    folders: Folders
    planner: Planner
    variants: list[Variant]
    shared: Shared

    def jobs(self) -> list[Job]:
        """Return the jobs of every point that is known."""
        return self.planner.jobs(self.points())

    def points(self) -> list[Point]:
        """Return the points of a grid or a random search, or those that Optuna asked for so far."""
        if self.config.search == "optuna":
            return asked_points(self.folders.asked, self.planner)
        return points_of(self.variants, self.config)

    def records(self) -> list[Record]:
        """Return the records of this sweep's jobs: others are of settings it had before."""
        records = self.folders.records()
        if self.config.search == "optuna":
            return records
        mine = {job.id for job in self.jobs()}
        return [record for record in records if record["id"] in mine]

    def left(self) -> list[Job]:
        """Return the jobs of known points that are yet to be run, or to be run again."""
        over = {record["id"] for record in self.folders.records() if self.is_over(record)}
        return [job for job in self.jobs() if job.id not in over]

    def is_over(self, record: Record) -> bool:
        """Return whether a job is not run again: it is where it failed, or none is stopped now."""
        again = (FAILED,) if self.config.early_stop else (FAILED, STOPPED)
        return record["status"] not in again

    @property
    def workers_per_trial(self) -> int:
        """Most Ray Train workers that a trial asks for."""
        baseline = self.planner.baseline.get("num_workers")
        own = baseline if isinstance(baseline, int) else 0
        return max(own, *workers_per_trial(self.variants).values())


def sweep(config: SweepConfig, notice: Notice, watching: Callable[[Sweep], Watch]) -> SweepResult:
    """Run a sweep, or what is left of it; write its table, its winner and its report.

    Args:
        config: What to try.
        notice: Told what the user should know.
        watching: Gives who is told of every job.

    Raises:
        OffsiteError: The space, the data or the model cannot be used.
        KeyboardInterrupt: The user stopped it; the results so far are written.
    """
    start = time.perf_counter()
    root = Path(config.out).resolve()
    check_parent(root / "sweep")
    busy = f"another sweep is at work in {root}; wait for its end, or choose another --out"
    with alone(root / ".lock", busy=busy):
        planned = plan_sweep(config, root, notice)
        watch: Watch = TensorBoardToo(planned.folders.tensorboard, watching(planned))
        if not config.keep_bundles:
            watch = PrunedToo(
                planned.folders, planned.planner, config.objectives, planned.left(), watch
            )
        ran = config.search == "optuna" or num_left(planned) > 0
        try:
            whole = _run(planned, watch, notice)
        except KeyboardInterrupt:
            whole = False
        result = finish(planned, time.perf_counter() - start, whole=whole, ran=ran)
        _check_any(planned.records())
    left = num_left(planned)
    if left or not whole:
        number = f"{left} jobs are" if left else "some jobs are"
        notice(
            f"{number} left; the same command goes on with them. What there is so far: "
            f"{result.table}, {result.report}"
        )
        raise KeyboardInterrupt
    return result


def _check_any(records: Sequence[Record]) -> None:
    """Refuse to call a sweep done of which no emulator was measured."""
    found = [record for record in records if record["job"]["role"] == "emulator"]
    failed = [record for record in found if record["status"] == FAILED]
    if failed and len(failed) == len(found):
        raise TrainingError(
            f"every emulator failed ({len(failed)} jobs); the first: {failed[0]['error']}"
        )


def plan_sweep(config: SweepConfig, root: Path, notice: Notice) -> Sweep:
    """Return what a sweep is going to do; its data are prepared and its settings written.

    Raises:
        OffsiteError: The space, the data or the model cannot be used.
    """
    folders, opened = Folders(root), open_sweep(config, notice)
    model = opened.model
    check_same(config, folders, model)
    data = {
        name: _prepared(sources, model, opened.config, config, folders.shared / name, notice)
        for name, sources in (("private", config.private), ("public", config.public))
        if sources
    }
    shared = Shared(
        root=str(root),
        model=str(model.resolve()),
        private=str(data["private"].path),
        public=str(data["public"].path) if "public" in data else None,
        blocks=config.blocks,
        text=tuple(_path(source) for source in config.text),
        tasks=config.tasks,
        task_data=tuple(_with_path(entry) for entry in config.task_data),
        task_path=tuple(_path(source) for source in config.task_path),
        task_limit=config.task_limit,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        dtype=config.dtype,
        teacher_cache=config.teacher_cache,
        facts={f"{name}_data": found.digest for name, found in data.items()},
    )
    return Sweep(
        config=config,
        folders=folders,
        planner=opened.planner,
        variants=opened.variants,
        shared=shared,
    )


def _path(source: str) -> str:
    """Return the path that a process with another working directory takes for the same."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def _with_path(entry: str) -> str:
    """Return a ``TASK=FILE`` with such a path."""
    task, _, file = entry.partition("=")
    return f"{task}={_path(file)}"


def _prepared(
    sources: Sequence[str],
    model: Path,
    model_config: Any,
    config: SweepConfig,
    out: Path,
    notice: Notice,
) -> Any:
    """Return prepared data: the user's own, or made in the sweep's directory, once."""
    own = [source for source in sources if is_prepared(source)]
    if own and len(sources) > 1:
        raise ConfigError(f"{own[0]} is prepared data; give it alone, or prepare all together")
    if own:
        return open_prepared(Path(own[0]).resolve(), model, model_config.vocab_size)
    once(out, lambda path: write_blocks(sources, model, config.seq_len, path, notice))
    return open_prepared(out, model, model_config.vocab_size)


def _run(planned: Sweep, watch: Watch, notice: Notice) -> bool:
    """Run what is left; return whether every job came to an end."""
    config, folders = planned.config, planned.folders
    records = planned.records()
    known = {record["id"]: record for record in records if planned.is_over(record)}
    if known:
        notice(f"{len(known)} jobs are finished already")
    if others := len(folders.records()) - len(records):
        notice(f"{others} results are of settings that the sweep has no more; they are left out")
    for record in records:
        if record["id"] not in known:
            folders.record_file(record["id"]).unlink()
    halving = None
    if not config.early_stop:
        shutil.rmtree(folders.stopped, ignore_errors=True)
    else:
        halving = Halving(
            folder=str(folders.rungs),
            grace_steps=config.grace_steps,
            reduction_factor=config.reduction_factor,
            proxy=config.proxy,
            planner=planned.planner,
        )
    source = _source(planned, known)
    if config.max_concurrent == 0:
        run_one_by_one(source, planned.shared, watch, halving, config.retries)
    elif not source.exhausted:
        from offsite_ray.tune.on_ray import run_on_tune

        run_on_tune(source, planned.shared, watch, halving, config, planned.workers_per_trial)
    return source.done


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


def _source(planned: Sweep, known: dict[str, Any]) -> Source:
    config = planned.config
    if config.search != "optuna":
        return Listed([job for job in planned.jobs() if job.id not in known])
    objectives = config.objectives

    def score(records: Sequence[Any]) -> list[float] | None:
        every = planned.folders.records()
        rows = rows_of(every, planned.planner)
        ids = {record["id"] for record in records}
        (point,) = summaries(row for row in rows if row["id"] in ids)
        found = scores(point.mean, objectives) if point.competes else None
        return None if found is None else list(found)

    return Suggested(
        planned.variants,
        planned.planner,
        config.num_points or 1,
        config.seed,
        known,
        score,
        ["maximize"] * len(objectives),
        planned.folders.asked,
    )


def num_left(planned: Sweep) -> int:
    """Return how many of the jobs that are known from the start have come to no end."""
    if planned.config.search == "optuna":
        return 0
    return sum(planned.folders.record(job.id) is None for job in planned.jobs())


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
