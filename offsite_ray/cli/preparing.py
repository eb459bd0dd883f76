# SPDX-License-Identifier: Apache-2.0
"""How far the preparing of a text is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from offsite_ray.cli.progress import SECONDS_BETWEEN_LINES, tell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Progress

    from offsite_ray.data import PartsRecord


@contextlib.contextmanager
def preparing_progress() -> Iterator[Callable[[PartsRecord], None]]:
    """Give what the preparing of a text reports to; it is all on stderr."""
    if not sys.stderr.isatty():
        yield PartLines()
        return
    with _bar() as progress:
        yield PartBar(progress)


class PartLines:
    """Progress as plain lines: one every ten seconds, and none of what takes no longer."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin to count the seconds.

        Args:
            clock: Gives the time in seconds.
        """
        self._clock = clock
        self._said = clock()

    def __call__(self, record: PartsRecord) -> None:
        """Take the next record."""
        if self._clock() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = self._clock()
            tell(f"part {record.num_done}/{record.num_parts}  {_amount(record)}")


class PartBar:
    """Progress as a bar of ``rich``."""

    def __init__(self, progress: Progress) -> None:
        """Add the bar, of unknown length until the first part is done.

        Args:
            progress: What draws it.
        """
        self._progress = progress
        self._task = progress.add_task("prepare", total=None, amount="")

    def __call__(self, record: PartsRecord) -> None:
        """Take the next record."""
        self._progress.update(
            self._task,
            total=record.num_parts,
            completed=record.num_done,
            amount=_amount(record),
        )


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    return Progress(
        "{task.description}",
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        "{task.fields[amount]}",
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _amount(record: PartsRecord) -> str:
    return f"{record.num_tokens:,} tokens  {record.tokens_per_s:,.0f} tokens/s"
