# SPDX-License-Identifier: Apache-2.0
"""What is known of a run, and where it stands. Reading it takes neither torch nor a cluster."""

from __future__ import annotations

import datetime
import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from offsite_ray.errors import OffsiteError, StorageError, unknown_name
from offsite_ray.results import to_plain
from offsite_ray.uris import is_uri, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_LOG = logging.getLogger(__name__)

RECORD = "run.json"
RECIPE = "recipe.yaml"
RESULT = "result.json"
METRICS = "metrics.jsonl"
LOG = "log.jsonl"

BEAT_S = 15.0
"""Between two signs of life of a run that is at work."""
LOST_S = 120.0
"""Without one, after which its process is taken for lost; clocks of nodes differ by less."""

Status = Literal["running", "succeeded", "failed", "stopped", "lost"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One process that was at work on a run. Times are ISO 8601, UTC."""

    started: str
    seen: str
    """When it last gave a sign of life."""
    ended: str | None = None
    status: Status = "running"
    """What it was when it was last seen."""
    exit_status: int | None = None
    """Of the process; None where it has not ended by itself."""
    error: str | None = None
    node: str = ""
    """Name of the machine."""
    process: int = 0
    """Number of the process there."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package name to version."""
    gpu_hours: float | None = None
    """GPUs that it held in a Ray cluster, times hours; None: unknown, or none was asked for."""
    cpu_hours: float | None = None
    """The same of CPUs."""

    def status_at(self, now: datetime.datetime) -> Status:
        """Return what it is by now: lost, where it should have given signs of life."""
        silent = (now - datetime.datetime.fromisoformat(self.seen)).total_seconds()
        return "lost" if self.status == "running" and silent > LOST_S else self.status


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """A run: what ``run.json`` holds."""

    name: str
    verb: str
    attempts: tuple[Attempt, ...]
    """In their order."""
    artefacts: tuple[Mapping[str, Any], ...] = ()
    """What it made: ``path``, ``kind`` and ``id``; the latter None where it has none."""

    @property
    def last(self) -> Attempt:
        """The attempt that counts: the last, but what was refused undoes no success."""
        done = [one for one in self.attempts if one.exit_status != OffsiteError.exit_status]
        return done[-1] if done and done[-1].status == "succeeded" else self.attempts[-1]

    @property
    def gpu_hours(self) -> float | None:
        """GPUs times hours of all attempts of which they are known; None: of none."""
        return _total(attempt.gpu_hours for attempt in self.attempts)

    @property
    def cpu_hours(self) -> float | None:
        """The same of CPUs."""
        return _total(attempt.cpu_hours for attempt in self.attempts)

    def to_json(self, now: datetime.datetime | None = None) -> dict[str, Any]:
        """Return it as ``run.json`` holds it.

        Args:
            now: When it is looked at; without, the status is the last one that was written.
        """
        last, attempts = self.last, list(self.attempts)
        if now is not None:
            last = replace(last, status=last.status_at(now))
            attempts[-1] = replace(attempts[-1], status=attempts[-1].status_at(now))
        return {
            "name": self.name,
            "verb": self.verb,
            "status": last.status,
            "exit_status": last.exit_status,
            "error": last.error,
            "started": self.attempts[0].started,
            "seen": last.seen,
            "ended": last.ended,
            "node": last.node,
            "versions": dict(last.versions),
            "device_hours": {"gpu": self.gpu_hours, "cpu": self.cpu_hours},
            "artefacts": to_plain(self.artefacts),
            "attempts": to_plain(attempts),
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> RunRecord:
        """Return what :meth:`to_json` made plain."""
        return cls(
            name=plain["name"],
            verb=plain["verb"],
            attempts=tuple(Attempt(**attempt) for attempt in plain["attempts"]),
            artefacts=tuple(plain["artefacts"]),
        )


def utc_now() -> datetime.datetime:
    """Return the time, in UTC."""
    return datetime.datetime.now(datetime.UTC)


def run_directory(runs: str, name: str) -> Path:
    """Return the directory of a run.

    Raises:
        StorageError: The directory of runs is no path.
    """
    if is_uri(runs):
        raise StorageError(
            f"the directory of runs must be a path that every node sees, not {shown(runs)}: logs "
            "are appended to, which object stores cannot; give a shared file system"
        )
    return Path(runs) / name


def read_run(directory: Path) -> RunRecord | None:
    """Return what is known of a run; None where nothing is.

    Raises:
        StorageError: The record cannot be read, or is none.
    """
    path = directory / RECORD
    try:
        return RunRecord.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} is no record of a run ({type(error).__name__}: {error}); move it away"
        ) from error


def list_runs(runs: str, name: str | None = None) -> list[RunRecord]:
    """Return the runs of a directory, the one that was begun last at the end.

    Args:
        runs: The directory.
        name: Of the only run that is wanted.

    Raises:
        StorageError: There is no such directory or run.
    """
    root = run_directory(runs, "")
    if not root.is_dir():
        raise StorageError(f"no directory {runs}; give the one of --runs, or that submit made")
    folders = sorted(path for path in root.iterdir() if (path / RECORD).is_file())
    if name is not None:
        if root / name not in folders:
            raise StorageError(unknown_name("run", name, [path.name for path in folders]))
        found = [read_run(root / name)]
    else:
        found = [_read_or_warn(folder) for folder in folders]
    return sorted(filter(None, found), key=lambda run: run.attempts[-1].started)


def _read_or_warn(directory: Path) -> RunRecord | None:
    """Read a record of many: one that is damaged hides no other."""
    try:
        return read_run(directory)
    except StorageError as error:
        _LOG.warning("%s", error)
        return None


def _total(hours: Iterable[float | None]) -> float | None:
    known = [value for value in hours if value is not None]
    return sum(known) if known else None
