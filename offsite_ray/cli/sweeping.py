# SPDX-License-Identifier: Apache-2.0
"""How far a sweep is: a bar on a terminal, a line for each job elsewhere; on stderr."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from offsite_ray.cli.progress import tell

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from rich.progress import Progress

    from offsite_ray.tune import Sweep
    from offsite_ray.tune.folders import Record
    from offsite_ray.tune.plan import Job

_WHAT = {
    "full": "full model",
    "fine_tuned": "full fine-tuning",
    "bound": "bound",
    "emulator": "emulator",
}


@contextlib.contextmanager
def sweep_progress() -> Iterator[Callable[[Sweep], JobLines | JobBar]]:
    """Give what makes the watch of a sweep."""
    if not sys.stderr.isatty():
        yield JobLines
        return
    with _bar() as progress:
        yield lambda planned: JobBar(planned, progress)


class Count:
    """What is known of a sweep while it runs."""

    def __init__(self, planned: Sweep) -> None:
        """Count what is done already.

        Args:
            planned: The sweep.
        """
        from offsite_ray.tune.space import varying

        records = planned.records()
        self.done = sum(map(planned.is_over, records))
        self.failed = 0
        self.best: tuple[float, str] | None = None
        self.total = None if planned.config.search == "optuna" else len(planned.jobs())
        self._varying = varying(planned.variants)
        for record in records:
            self._look(record)

    def ended(self, record: Record) -> None:
        """Count a job that has come to an end."""
        self.done += 1
        self.failed += record["status"] == "failed"
        self._look(record)

    def _look(self, record: Record) -> None:
        nats = _nats(record, "plug_in")
        if nats is not None and (self.best is None or nats < self.best[0]):
            self.best = (nats, record["point"])

    def line(self, record: Record) -> str:
        """Return what became of a job, in a line that tells it from the others."""
        return job_line(record, self._varying)

    @property
    def summary(self) -> str:
        """How the sweep stands, in a few words."""
        best = "" if self.best is None else f"  best plug-in {self.best[0]:.3f} nats"
        return f"{self.failed} failed{best}" if self.failed else best.strip()


class JobLines:
    """Progress as plain lines: one for each job that has come to an end."""

    def __init__(self, planned: Sweep) -> None:
        """Say what is to be run.

        Args:
            planned: The sweep.
        """
        self._count = Count(planned)
        if self._count.total is not None:
            tell(f"{self._count.total} jobs, {self._count.total - self._count.done} to be run")

    def started(self, job: Job) -> None:
        """Say nothing: there may be hundreds."""

    def evaluated(self, job: Job, step: int, losses: Mapping[str, float]) -> None:
        """Say nothing; TensorBoard has it."""

    def ended(self, record: Record) -> None:
        """Say what became of a job."""
        self._count.ended(record)
        total = "" if self._count.total is None else f"/{self._count.total}"
        tell(f"[{self._count.done}{total}] {self._count.line(record)}")


class JobBar:
    """Progress as a bar of ``rich``, with a line above it for each job."""

    def __init__(self, planned: Sweep, progress: Progress) -> None:
        """Add the bar.

        Args:
            planned: The sweep.
            progress: What draws it.
        """
        self._count, self._progress = Count(planned), progress
        self._running: dict[str, str] = {}
        self._task = progress.add_task(
            "sweep", total=self._count.total, completed=self._count.done, now="", best=""
        )

    def started(self, job: Job) -> None:
        """Show a job that is at work."""
        self._running[job.id] = _WHAT[job.role]
        self._show()

    def evaluated(self, job: Job, step: int, losses: Mapping[str, float]) -> None:
        """Show how far a distillation is."""
        self._running[job.id] = f"step {step} loss {losses.get('loss', float('nan')):.4g}"
        self._show()

    def ended(self, record: Record) -> None:
        """Show what became of a job."""
        self._count.ended(record)
        self._running.pop(record["id"], None)
        self._progress.console.print(self._count.line(record), markup=False, highlight=False)
        self._show()

    def _show(self) -> None:
        now = ", ".join(self._running.values())
        self._progress.update(
            self._task, completed=self._count.done, now=now, best=self._count.summary
        )


def job_line(record: Record, varying: Collection[str]) -> str:
    """Return what became of a job, in a line.

    Args:
        record: Of the job.
        varying: Knobs of the sweep that have more than one value.
    """
    job = record["job"]
    named = [_WHAT[job["role"]], _settings(job["settings"], varying), f"seed {job['seed']}"]
    if job["control"]:
        named.insert(1, f"{job['control']} control")
    what = ", ".join(filter(None, named))
    if record["status"] != "finished":
        return f"{what}: {record['status']}{': ' + record['error'] if record['error'] else ''}"
    found = []
    for setting, result in record["measured"].items():
        nats = (result or {}).get("nats_per_token")
        scores = [metrics.get("acc") for metrics in ((result or {}).get("tasks") or {}).values()]
        numbers = [f"{value:.3f}" for value in (nats, *scores) if value is not None]
        found.append(f"{setting.replace('_', ' ')} {' '.join(numbers)}")
    return f"{what}: {'; '.join(found)} ({record['seconds']['all']:.1f} s)"


def _settings(settings: Mapping[str, Mapping[str, Any]], varying: Collection[str]) -> str:
    compress, distill = settings.get("compress", {}), settings.get("distill", {})
    parts = [str(value) for value in compress.values() if value != "none"]
    if distill:
        parts.append(f"{distill['max_steps']} steps")
    for stage, fields in settings.items():
        for name, value in fields.items():
            knob = f"{stage}.{name}"
            if stage != "compress" and knob in varying and knob != "distill.max_steps":
                parts.append(str(value) if name == "method" else f"{knob}={value}")
    return " ".join(parts)


def _nats(record: Record, setting: str) -> float | None:
    measured = (record.get("measured") or {}).get(setting) or {}
    nats: float | None = measured.get("nats_per_token")
    return nats


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    return Progress(
        "{task.description}",
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        "{task.fields[best]}",
        "{task.fields[now]}",
        console=Console(stderr=True),
    )
