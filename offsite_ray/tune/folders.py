# SPDX-License-Identifier: Apache-2.0
"""The directory of a sweep: where each job lies, its record, and what is made but once.

A job's record is a file of its own, written at once or not at all, so what is finished is known
whatever happened to the process that ran the sweep.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offsite_ray.bundle import alone, write_json
from offsite_ray.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
"""What became of a job: measured; stopped early; failed as often as it was tried."""

Record = dict[str, Any]
"""What is known of a job that has come to an end: plain values, as JSON holds them."""


@dataclass(frozen=True, slots=True)
class Folders:
    """Where things lie below the directory of a sweep."""

    root: Path

    @property
    def trials(self) -> Path:
        """A folder for each job."""
        return self.root / "trials"

    @property
    def emulators(self) -> Path:
        """A folder for each emulator that jobs train against."""
        return self.root / "emulators"

    @property
    def shared(self) -> Path:
        """What every job reads: prepared data."""
        return self.root / "shared"

    @property
    def settings(self) -> Path:
        """What the sweep was started with, as JSON."""
        return self.root / "sweep.json"

    @property
    def rungs(self) -> Path:
        """Losses at the steps at which distillations are compared."""
        return self.root / "rungs"

    @property
    def stopped(self) -> Path:
        """A file for each emulator whose distillation was stopped early."""
        return stopped_in(self.rungs)

    @property
    def asked(self) -> Path:
        """Points that Optuna asked for, as JSON."""
        return self.root / "asked.json"

    @property
    def ray(self) -> Path:
        """What Ray Tune keeps; nothing is read back from it."""
        return self.root / ".ray"

    @property
    def table(self) -> Path:
        """The results, a row a job."""
        return self.root / "results.parquet"

    @property
    def winner(self) -> Path:
        """The bundle that won, and its recipe."""
        return self.root / "winner"

    @property
    def report(self) -> Path:
        """The page."""
        return self.root / "report.html"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's files, a run a job."""
        return self.root / "tensorboard"

    def of(self, job: str) -> Path:
        """Return the folder of a job."""
        return self.trials / job

    def emulator(self, name: str) -> Path:
        """Return the folder of an emulator."""
        return self.emulators / name

    def record_file(self, job: str) -> Path:
        """Return the file that a finished job has."""
        return self.of(job) / "result.json"

    def record(self, job: str) -> Record | None:
        """Return the record of a job; None where it has come to no end."""
        return read_record(self.record_file(job))

    def write_record(self, job: str, record: Record) -> None:
        """Write the record of a job; from then on it is not run again."""
        write_json(self.record_file(job), record)

    def records(self) -> list[Record]:
        """Return every record, by the name of its job."""
        found = (read_record(path) for path in sorted(self.trials.glob("*/result.json")))
        return [record for record in found if record is not None]

    @property
    def began(self) -> bool:
        """Whether some job has come to a result, or is on its way to one."""
        jobs = (path.name for path in self.trials.glob("*") if path.is_dir())
        records = map(self.record, jobs)
        return any(record is None or record["status"] != FAILED for record in records)

    def clear(self) -> None:
        """Remove what was made for settings that nothing came of."""
        for path in (self.trials, self.emulators, self.shared, self.rungs, self.tensorboard):
            shutil.rmtree(path, ignore_errors=True)
        self.asked.unlink(missing_ok=True)


def stopped_in(rungs: Path) -> Path:
    """Return where, beside the rungs, it is told which distillations were stopped early."""
    return rungs / "stopped"


def read_record(path: Path) -> Record | None:
    """Return a record; None where there is none.

    Raises:
        StorageError: It is damaged.
    """
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {error}; remove it to run it again") from error
    return record


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """Return a path that is made if it is not there, by one process at a time.

    Args:
        path: What is wanted.
        make: Makes it, whole or not at all.
    """
    if not path.exists():
        with alone(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                make(path)
    return path


def remove(*paths: Path) -> None:
    """Remove directories and the runs beside them, as far as they are there.

    What is half removed has another name, should this process be killed.
    """
    for path in paths:
        gone = path.with_name(f".{path.name}.tmp-gone")
        if path.is_dir():
            shutil.rmtree(gone, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.rename(gone)
        for left in (gone, path.with_name(f".{path.name}.run")):
            shutil.rmtree(left, ignore_errors=True)
