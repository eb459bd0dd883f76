# SPDX-License-Identifier: Apache-2.0
"""How far a training run is: a bar on a terminal, a line now and then elsewhere; on stderr."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from offsite_ray.results import (
    CheckpointRecord,
    DevicesRecord,
    EvalRecord,
    Record,
    RunStart,
    StepRecord,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rich.progress import Progress

    from offsite_ray.results import Report

_LOG = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


def tell(text: str) -> None:
    """Print a notice on stderr; the log of a run has it, too."""
    print(text, file=sys.stderr, flush=True)
    _LOG.info("%s", text)


@contextlib.contextmanager
def training_progress(name: str) -> Iterator[Report]:
    """Give what a training run reports to.

    Args:
        name: What the bar is called.
    """
    if not sys.stderr.isatty():
        yield Lines()
        return
    with _bar() as progress:
        yield Bar(progress, name)


class Lines:
    """Progress as plain lines: every ten seconds, at each evaluation, and at the last step."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin to count the seconds.

        Args:
            clock: Gives the time in seconds.
        """
        self._clock = clock
        self._said = clock()
        self._total = 0

    def __call__(self, record: Record) -> None:
        """Take the next record."""
        if isinstance(record, RunStart):
            self._total = record.total_steps
            tell(_start_line(record))
            return
        if isinstance(record, CheckpointRecord | DevicesRecord):
            return
        held_out = isinstance(record, EvalRecord)
        due = self._clock() - self._said >= SECONDS_BETWEEN_LINES
        if held_out or due or record.step == self._total:
            self._said = self._clock()
            loss = f"held-out {_losses(record.losses)}" if held_out else _losses(record.losses)
            tell(f"step {record.step}/{self._total}  {loss}{_speed(record)}")


class Bar:
    """Progress as a bar of ``rich``."""

    def __init__(self, progress: Progress, name: str) -> None:
        """Add the bar, of unknown length until the run starts.

        Args:
            progress: What draws it.
            name: What it is called.
        """
        self._progress = progress
        self._task = progress.add_task(name, total=None, loss="", held_out="")

    def __call__(self, record: Record) -> None:
        """Take the next record."""
        changes: dict[str, Any] = {}
        if isinstance(record, RunStart):
            changes = {"total": record.total_steps, "completed": record.first_step}
        elif isinstance(record, EvalRecord):
            changes = {"held_out": f"held-out {record.losses.get('loss', float('nan')):.4g}"}
        elif isinstance(record, StepRecord):
            loss = f"loss {record.losses.get('loss', float('nan')):.4g}{_speed(record)}"
            changes = {"completed": record.step, "loss": loss}
        self._progress.update(self._task, **changes)


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    return Progress(
        "{task.description}",
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        "{task.fields[loss]}",
        "{task.fields[held_out]}",
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _start_line(start: RunStart) -> str:
    resumed = f", from step {start.first_step}" if start.first_step else ""
    return (
        f"{start.total_steps} steps{resumed}; {start.num_train} sequences to train on, "
        f"{start.num_held_out} held out"
    )


def _losses(losses: Mapping[str, float]) -> str:
    parts = [f"{name} {value:.4g}" for name, value in losses.items() if name != "loss"]
    total = f"loss {losses['loss']:.4g}" if "loss" in losses else ""
    return " ".join(filter(None, (total, f"({', '.join(parts)})" if parts else "")))


def _speed(record: StepRecord | EvalRecord) -> str:
    speed = record.tokens_per_s if isinstance(record, StepRecord) else None
    return "" if speed is None else f"  {speed:,.0f} tokens/s"
