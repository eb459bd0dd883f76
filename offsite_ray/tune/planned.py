# SPDX-License-Identifier: Apache-2.0
"""A sweep that is planned: its jobs, its data, and what every job shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.data import is_prepared, open_prepared, write_blocks
from offsite_ray.errors import ConfigError
from offsite_ray.storage import found_by_all
from offsite_ray.tune.bench import Shared
from offsite_ray.tune.checks import check_same, workers_per_trial
from offsite_ray.tune.folders import FAILED, STOPPED, Folders, once
from offsite_ray.tune.opening import open_sweep, points_of
from offsite_ray.tune.search import asked_points
from offsite_ray.uris import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offsite_ray.architectures import Notice
    from offsite_ray.config import SweepConfig
    from offsite_ray.data import PreparedData
    from offsite_ray.tune.folders import Record
    from offsite_ray.tune.plan import Job, Planner
    from offsite_ray.tune.space import Point, Variant


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
        model=found_by_all(config.model, model),
        private=_name(data["private"]),
        public=_name(data["public"]) if "public" in data else None,
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


def _name(data: PreparedData) -> str:
    return data.uri or str(data.path)


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
        raise ConfigError(
            f"{shown(own[0])} is prepared data; give it alone, or prepare all together"
        )
    if own:
        return open_prepared(own[0], model, model_config.vocab_size)
    once(out, lambda path: write_blocks(sources, model, config.seq_len, path, notice))
    return open_prepared(out, model, model_config.vocab_size)
