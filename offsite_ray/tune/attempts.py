# SPDX-License-Identifier: Apache-2.0
"""Jobs that stop early, fail, crash, are tried again: each comes to an end with a record."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from offsite_ray.errors import DivergedError, OffsiteError, first_line
from offsite_ray.tune.emulators import StopTrial, discard
from offsite_ray.tune.folders import FAILED, STOPPED, Folders, Record, remove
from offsite_ray.tune.trial import base_record, run_job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from offsite_ray.tune.bench import Shared, Tell
    from offsite_ray.tune.halving import Halving
    from offsite_ray.tune.plan import Job
    from offsite_ray.tune.search import Source

ARTEFACTS = ("keep-all", "adapter", "fine-tuned")
"""What a job may leave in its folder."""

TRACEBACK = "traceback.txt"
"""File in the folder of a job that crashed, of its last attempt."""


class Watch(Protocol):
    """Told what happens in a sweep, in the process that runs it."""

    def started(self, job: Job) -> None:
        """Take note of a job that is at work."""
        ...

    def evaluated(self, job: Job, step: int, losses: Mapping[str, float]) -> None:
        """Take note of an evaluation of a distillation."""
        ...

    def ended(self, record: Record) -> None:
        """Take note of a job that has come to an end."""
        ...


def try_job(job: Job, shared: Shared, tell: Tell) -> Record:
    """Run a job; return its record, also where trying again would not help.

    Raises:
        Exception: It crashed, and may be tried again.
    """
    try:
        return run_job(job, shared, tell)
    except StopTrial:
        return end_stopped(job, shared)
    except OffsiteError as error:
        # A loss that is not a number comes again from the same checkpoint.
        useless = isinstance(error, DivergedError)
        if error.exit_status != OffsiteError.exit_status and not useless:
            raise
        return end_failed(job, shared, str(error), attempts=1)


def end_stopped(job: Job, shared: Shared) -> Record:
    """Write and return the record of a job that was stopped early."""
    folders = Folders(Path(shared.root))
    record = base_record(job, STOPPED)
    remove(*(folders.of(job.id) / name for name in ARTEFACTS))
    if job.emulator is not None:
        discard(folders, job.emulator)
    folders.write_record(job.id, record)
    return record


def end_failed(job: Job, shared: Shared, error: str, *, attempts: int) -> Record:
    """Write and return the record of a job that failed."""
    record = base_record(job, FAILED, attempts=attempts)
    record["error"] = " ".join(error.split())[:1000]
    Folders(Path(shared.root)).write_record(job.id, record)
    return record


@contextlib.contextmanager
def last_words_kept(job: Job, shared: Shared) -> Iterator[None]:
    """Keep what a crash says in the job's folder, for the process that runs the sweep.

    Where it came from stands beside it, for who wants to know why.
    """
    said = _last_words_file(job, shared)
    where = said.with_name(TRACEBACK)
    said.unlink(missing_ok=True)
    where.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        said.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(traceback.format_exc(), encoding="utf-8")
        said.write_text(f"{type(error).__name__}: {first_line(error)}", encoding="utf-8")
        raise


def last_words(job: Job, shared: Shared) -> str:
    """Return what a job said when it last crashed."""
    said = _last_words_file(job, shared)
    if said.is_file():
        return said.read_text(encoding="utf-8")
    return "the trial's process was lost: killed, or out of memory"


def _last_words_file(job: Job, shared: Shared) -> Path:
    return Folders(Path(shared.root)).of(job.id) / "crash.txt"


def run_one_by_one(
    source: Source, shared: Shared, watch: Watch, halving: Halving | None, retries: int
) -> None:
    """Run jobs one after the other in this process."""
    while (job := source.next()) is not None:
        watch.started(job)
        record = _tried(job, shared, _told(job, watch, halving), retries)
        source.told(record)
        watch.ended(record)


def _told(job: Job, watch: Watch, halving: Halving | None) -> Callable[..., None]:
    def tell(step: int, losses: Mapping[str, float]) -> None:
        watch.evaluated(job, step, losses)
        if halving is not None and halving.stops(job, step, losses):
            raise StopTrial

    return tell


def _tried(job: Job, shared: Shared, tell: Tell, retries: int) -> Record:
    said = ""
    for _ in range(retries + 1):
        try:
            with last_words_kept(job, shared):
                return try_job(job, shared, tell)
        except Exception:
            said = last_words(job, shared)
    return end_failed(job, shared, said, attempts=retries + 1)


class Silent:
    """Watches and says nothing."""

    def started(self, job: Job) -> None:
        """Say nothing."""

    def evaluated(self, job: Job, step: int, losses: Mapping[str, float]) -> None:
        """Say nothing."""

    def ended(self, record: Record) -> None:
        """Say nothing."""
