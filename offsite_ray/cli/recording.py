# SPDX-License-Identifier: Apache-2.0
"""The run that a verb is at work on: its record, its log, its metrics.

What a verb reports on its way goes to the terminal, to the run's directory where it has one, and to
Ray's metrics where this process is connected to Ray.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from offsite_ray.cli.preparing import preparing_progress
from offsite_ray.cli.progress import tell, training_progress
from offsite_ray.cli.sweeping import Count, sweep_progress
from offsite_ray.errors import first_line
from offsite_ray.monitoring import Gauges, of_preparing, of_run, of_sweep, of_training
from offsite_ray.results import DevicesRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from offsite_ray.cli.arguments import Request
    from offsite_ray.cli.verb import Verb
    from offsite_ray.config import TrainingConfig
    from offsite_ray.data import PartsRecord
    from offsite_ray.results import Record, Report
    from offsite_ray.runs import Recorder
    from offsite_ray.tune import Sweep
    from offsite_ray.tune.attempts import Watch
    from offsite_ray.tune.folders import Record as JobRecord
    from offsite_ray.tune.plan import Job


class Running:
    """What is at work: a verb, as a run with a record or without."""

    def __init__(self, verb: str, run: str = "") -> None:
        """Begin.

        Args:
            verb: Its name.
            run: Name of the run, if it has one.
        """
        self.gauges = Gauges(run, verb)
        self.recorder: Recorder | None = None

    def hold(self, num_gpus: float, num_cpus: float) -> None:
        """Count devices that workers hold in a cluster from now on."""
        if self.recorder is not None:
            self.recorder.hold(num_gpus, num_cpus)
        self.gauges.set(of_training(DevicesRecord(num_gpus=num_gpus, num_cpus=num_cpus)))

    def metric(self, values: Mapping[str, Any]) -> None:
        """Keep a line of numbers."""
        if self.recorder is not None:
            self.recorder.metric(values)


_RUNNING: ContextVar[Running | None] = ContextVar("running", default=None)


def _running() -> Running:
    return _RUNNING.get() or Running("")


@contextlib.contextmanager
def running(verb: Verb, request: Request) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Keep the record of a verb's run, where it is to have one, until the block ends.

    Yields:
        What takes the result.
    """
    now = Running(verb.name, request.run or "")
    token = _RUNNING.set(now)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(now.gauges.kept())
            if request.run is None or request.runs is None:
                yield lambda _: None
                return
            from offsite_ray.runs import recorded

            if verb.name != "serve":  # whose replicas measure
                stack.enter_context(_connected())
            now.recorder = stack.enter_context(
                recorded(
                    request.runs,
                    request.run,
                    verb.name,
                    request.config,
                    lambda r: now.gauges.set(of_run(r.seconds, r.num_gpus, r.num_cpus)),
                )
            )
            yield now.recorder.result
    finally:
        _RUNNING.reset(token)


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Connect to the cluster that ``RAY_ADDRESS`` names, as it does for every job, for metrics."""
    with contextlib.ExitStack() as stack:
        if os.environ.get("RAY_ADDRESS"):
            from offsite_ray.cluster import embedded_ray

            try:
                stack.enter_context(embedded_ray(0))
            except Exception as error:
                tell(f"no metrics of this run: {first_line(error)}")
        yield


@contextlib.contextmanager
def training_report(name: str, config: TrainingConfig) -> Iterator[Report]:
    """Give what a training reports to."""
    from offsite_ray.training.metrics import logged

    now = _running()
    directory = None if now.recorder is None else now.recorder.directory

    with (
        training_progress(name) as progress,
        logged(config, progress, directory) as report,
    ):

        def all_of_them(record: Record) -> None:
            if isinstance(record, DevicesRecord):
                now.hold(record.num_gpus, record.num_cpus)
            else:
                now.gauges.set(of_training(record))
            report(record)

        yield all_of_them


@contextlib.contextmanager
def preparing_report(num_workers: int) -> Iterator[Callable[[PartsRecord], None]]:
    """Give what the preparing of a text reports to.

    Args:
        num_workers: Of Ray Data, each of which holds a CPU; 0: none.
    """
    now = _running()
    with preparing_progress() as progress:

        def all_of_them(record: PartsRecord) -> None:
            now.gauges.set(of_preparing(record))
            progress(record)

        if num_workers:
            now.hold(0, num_workers)
        try:
            yield all_of_them
        finally:
            if num_workers:
                now.hold(0, 0)


@contextlib.contextmanager
def sweep_watch() -> Iterator[Callable[[Sweep], Watch]]:
    """Give what makes the watch of a sweep."""
    with sweep_progress() as watching:
        yield lambda planned: SweepWatch(planned, watching(planned), _running())


def _line_of(record: JobRecord) -> dict[str, Any]:
    known = {key: record.get(key) for key in ("status", "measured", "seconds")}
    return {"job": record["id"], **known}


class SweepWatch:
    """Watches a sweep for its metrics, and passes on what it is told."""

    def __init__(self, planned: Sweep, inner: Watch, now: Running) -> None:
        """Look at what is done already.

        Args:
            planned: The sweep.
            inner: Told everything, too.
            now: Where metrics go.
        """
        self._inner, self._now, self._config = inner, now, planned.config
        self._count = Count(planned)
        done = [record for record in planned.records() if planned.is_over(record)]
        self._ended = Counter({"finished": 0, "failed": 0, "stopped": 0})
        self._ended.update(record["status"] for record in done)
        self._add_unseen(done)
        self._at_work: set[str] = set()
        self._known = planned.workers_per_trial == 0 and planned.config.max_concurrent != 0
        self._look()

    def started(self, job: Job) -> None:
        """Count a job that is at work."""
        self._at_work.add(job.id)
        self._look()
        self._inner.started(job)

    def evaluated(self, job: Job, step: int, losses: Mapping[str, float]) -> None:
        """Pass it on."""
        self._inner.evaluated(job, step, losses)

    def ended(self, record: JobRecord) -> None:
        """Count a job that has come to an end."""
        self._at_work.discard(record["id"])
        self._ended[record["status"]] += 1
        self._count.ended(record)
        self._now.metric(_line_of(record))
        self._look()
        self._inner.ended(record)

    def _add_unseen(self, done: Sequence[JobRecord]) -> None:
        """Keep the lines of jobs that ended when nobody watched any more, as around a Ctrl-C."""
        if self._now.recorder is not None:
            seen = {line.get("job") for line in self._now.recorder.metrics()}
            for record in done:
                if record["id"] not in seen:
                    self._now.metric(_line_of(record))

    def _look(self) -> None:
        num, config = len(self._at_work), self._config
        if self._known:  # workers of trials come and go with what a trial does
            self._now.hold(num * config.num_gpus, num * config.num_cpus)
        statuses = {"running": num, **self._ended}
        best = None if self._count.best is None else self._count.best[0]
        self._now.gauges.set(of_sweep(statuses, self._count.total, best))
