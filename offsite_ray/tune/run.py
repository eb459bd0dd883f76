# SPDX-License-Identifier: Apache-2.0
"""A sweep from its configuration to its results."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.bundle import alone, check_parent
from offsite_ray.errors import TrainingError
from offsite_ray.tune.attempts import run_one_by_one
from offsite_ray.tune.finish import finish
from offsite_ray.tune.folders import FAILED
from offsite_ray.tune.front import scores
from offsite_ray.tune.halving import Halving
from offsite_ray.tune.planned import plan_sweep
from offsite_ray.tune.recipe import PrunedToo
from offsite_ray.tune.search import Listed, Suggested
from offsite_ray.tune.table import rows_of, summaries
from offsite_ray.tune.tensorboard import TensorBoardToo
from offsite_ray.uris import refuse_uri

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offsite_ray.architectures import Notice
    from offsite_ray.config import SweepConfig
    from offsite_ray.tune.attempts import Watch
    from offsite_ray.tune.finish import SweepResult
    from offsite_ray.tune.folders import Record
    from offsite_ray.tune.planned import Sweep
    from offsite_ray.tune.search import Source


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
    refuse_uri("--out", config.out)
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
