# SPDX-License-Identifier: Apache-2.0
"""Keeping the record of a run while it is at work, so that a killed process leaves a true one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import platform
import signal
import socket
import threading
import time
import traceback
from importlib import metadata
from typing import TYPE_CHECKING, Any

from offsite_ray import __version__
from offsite_ray.errors import ConfigError, OffsiteError, StorageError
from offsite_ray.repeating import repeating
from offsite_ray.results import to_plain
from offsite_ray.runs.log import logging_to
from offsite_ray.runs.record import (
    BEAT_S,
    LOG,
    METRICS,
    RECIPE,
    RECORD,
    RESULT,
    Attempt,
    RunRecord,
    read_run,
    run_directory,
    utc_now,
)
from offsite_ray.uris import is_uri, scrubbed, without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from offsite_ray.runs.record import Status

_LOG = logging.getLogger(__name__)
_PACKAGES = ("torch", "transformers", "ray", "deepspeed", "safetensors")
_ARTEFACTS = ("out", "table", "report", "recipe")
"""Keys of a result below which the path of something that was made stands."""


class Recorder:
    """Writes what becomes of a run; all of it from one process, from any of its threads."""

    def __init__(
        self, directory: Path, record: RunRecord, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Write the record for the first time.

        Args:
            directory: Of the run.
            record: The last attempt of which is the one that begins.
            clock: Gives the time in seconds.

        Raises:
            StorageError: It cannot be written.
        """
        self.directory = directory
        self.record = record
        self.num_gpus: float | None = None
        """What is held in a cluster; None: nobody has said so far."""
        self.num_cpus: float | None = None
        self._clock = clock
        self._began = self._looked = clock()
        # A signal may find the thread that handles it within a writing.
        self._lock = threading.RLock()
        self._failed = False
        self._write(RECORD, self.record.to_json())

    @property
    def seconds(self) -> float:
        """Since this attempt began."""
        return self._clock() - self._began

    def hold(self, num_gpus: float, num_cpus: float) -> None:
        """Count so many devices that are held in a cluster from now on."""
        with self._lock:
            self._count()
            self.num_gpus, self.num_cpus = num_gpus, num_cpus

    def beat(self) -> None:
        """Give a sign of life."""
        with self._lock:
            if self.record.attempts[-1].status == "running":
                self._change()

    def metric(self, values: Mapping[str, Any]) -> None:
        """Append a line of numbers by name."""
        with self._lock, self._said_once(), (self.directory / METRICS).open("a") as file:
            file.write(json.dumps(_plain(values)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of numbers so far; one that was cut by a kill is left out."""
        path, found = self.directory / METRICS, []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def result(self, plain: Mapping[str, Any]) -> None:
        """Keep what the verb gave back, and where what it made is."""
        artefacts = tuple(
            {
                "path": os.path.abspath(plain[key]) if not is_uri(plain[key]) else plain[key],
                "kind": key,
                "id": (plain.get("id") or plain.get("digest")) if key == "out" else None,
            }
            for key in _ARTEFACTS
            if isinstance(plain.get(key), str)
        )
        with self._lock, self._said_once():
            self.record = dataclasses.replace(self.record, artefacts=artefacts)
            self._write(RESULT, plain)

    def end(self, status: Status, exit_status: int | None, error: str | None = None) -> None:
        """Say how the attempt ended."""
        with self._lock:
            ended = utc_now().isoformat(timespec="seconds")
            self._change(status=status, exit_status=exit_status, error=error, ended=ended)

    def _change(self, **changes: Any) -> None:
        self._count()
        changes["seen"] = utc_now().isoformat(timespec="seconds")
        *earlier, last = self.record.attempts
        attempts = (*earlier, dataclasses.replace(last, **changes))
        self.record = dataclasses.replace(self.record, attempts=attempts)
        with self._said_once():
            self._write(RECORD, self.record.to_json())

    def _count(self) -> None:
        """Add the devices that were held since this was last done."""
        now = self._clock()
        hours, self._looked = (now - self._looked) / 3600, now
        *earlier, last = self.record.attempts
        counted = dataclasses.replace(
            last,
            gpu_hours=_more(last.gpu_hours, self.num_gpus, hours),
            cpu_hours=_more(last.cpu_hours, self.num_cpus, hours),
        )
        self.record = dataclasses.replace(self.record, attempts=(*earlier, counted))

    def _write(self, name: str, plain: Any) -> None:
        write_text(self.directory / name, json.dumps(_plain(plain), indent=1) + "\n")

    @contextlib.contextmanager
    def _said_once(self) -> Iterator[None]:
        """Go on where the record cannot be written: the run itself may well be able to."""
        try:
            yield
        except (OSError, StorageError) as error:
            if not self._failed:
                self._failed = True
                _LOG.warning("the record of the run cannot be written: %s", error)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    # Late: a listing of runs needs no torch.
    from offsite_ray.bundle import atomic_file

    with atomic_file(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def recorded(
    runs: str,
    name: str,
    verb: str,
    config: Any,
    at_beat: Callable[[Recorder], None] = lambda _: None,
) -> Iterator[Recorder]:
    """Keep the record of a run until the block ends, however it does.

    Args:
        runs: Directory of all runs.
        name: Of this one; one that has run before gets another attempt.
        verb: What is run.
        config: Its configuration, as resolved.
        at_beat: Called at the start and with every sign of life, by another thread.

    Raises:
        StorageError: The directory cannot be written, or a process is at work on the run.
        ConfigError: The run is of another verb.
    """
    from offsite_ray.bundle import alone

    directory = run_directory(runs, name)
    busy = (
        f"a process is at work on the run {name!r}; 'offsite-ray runs --runs {runs} --name {name}' "
        "says where; wait for its end, or choose another --run"
    )
    with alone(directory / ".lock", busy=busy):
        before = read_run(directory)
        if before is not None and before.verb != verb:
            raise ConfigError(
                f"{directory} is a run of {before.verb}, not of {verb}; choose another --run"
            )
        recipe, earlier = directory / RECIPE, _recipe_of_success(directory, before)
        write_text(recipe, _recipe_text(verb, config))
        recorder = Recorder(directory, _begun(name, verb, before))
        log = logging_to(
            directory / LOG, run=name, verb=verb, attempt=len(recorder.record.attempts)
        )
        with log, _beating(recorder, at_beat), _ended_by_signal(recorder):
            _LOG.info("%s begins", verb)
            try:
                yield recorder
            except BaseException as error:
                _end_badly(recorder, error)
                if earlier is not None and exit_status_of(error) == OffsiteError.exit_status:
                    write_text(recipe, earlier)
                raise
            recorder.end("succeeded", 0)
            _LOG.info("%s succeeded after %.1f s", verb, recorder.seconds)


def _recipe_text(verb: str, config: Any) -> str:
    """Return what the recipe of a run holds."""
    return _yaml({verb: _plain(config)})


def made_before(runs: str, name: str, verb: str, config: Any) -> tuple[str, ...]:
    """Return the paths of what a run has made; none where it has not succeeded with this recipe.

    Args:
        runs: Directory of all runs.
        name: Of the run.
        verb: What is asked of it.
        config: With which configuration, as resolved.
    """
    directory = run_directory(runs, name)
    record = read_run(directory)
    if record is None or _recipe_of_success(directory, record) != _recipe_text(verb, config):
        return ()
    return tuple(made["path"] for made in record.artefacts)


def _recipe_of_success(directory: Path, record: RunRecord | None) -> str | None:
    """Return the recipe of a run that has succeeded."""
    if record is None or record.last.status != "succeeded":
        return None
    recipe = directory / RECIPE
    return recipe.read_text(encoding="utf-8") if recipe.is_file() else None


def exit_status_of(error: BaseException) -> int:
    """Return the exit status of a process that an error ends."""
    if isinstance(error, OffsiteError):
        return error.exit_status
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _begun(name: str, verb: str, before: RunRecord | None) -> RunRecord:
    """Return the record of a run of which another attempt begins."""
    now = utc_now().isoformat(timespec="seconds")
    earlier = () if before is None else before.attempts
    # Nobody else has the lock, so who was at work is no more.
    ended = tuple(
        dataclasses.replace(attempt, status="lost", ended=attempt.seen)
        if attempt.status == "running"
        else attempt
        for attempt in earlier
    )
    attempt = Attempt(
        started=now,
        seen=now,
        node=socket.gethostname(),
        process=os.getpid(),
        versions=_versions(),
    )
    artefacts = () if before is None else before.artefacts
    return RunRecord(name=name, verb=verb, attempts=(*ended, attempt), artefacts=artefacts)


def _end_badly(recorder: Recorder, error: BaseException) -> None:
    said = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")[:1000]
    if isinstance(error, OffsiteError):
        said = " ".join(str(error).split())[:1000]
    if isinstance(error, KeyboardInterrupt | SystemExit):
        recorder.end("stopped", exit_status_of(error), said)
        _LOG.warning("stopped after %.1f s", recorder.seconds)
    else:
        recorder.end("failed", exit_status_of(error), said)
        trace = None if isinstance(error, OffsiteError) else traceback.format_exc()
        _LOG.info("failed after %.1f s: %s", recorder.seconds, said, extra={"traceback": trace})


def _beating(
    recorder: Recorder, at_beat: Callable[[Recorder], None]
) -> contextlib.AbstractContextManager[None]:
    """Give signs of life until the block ends."""

    def beat() -> None:
        recorder.beat()
        at_beat(recorder)

    at_beat(recorder)
    return repeating(beat, BEAT_S, "run-record")


@contextlib.contextmanager
def _ended_by_signal(recorder: Recorder) -> Iterator[None]:
    """Let SIGTERM, by which jobs are stopped, end the block as Ctrl-C does.

    Ray kills a job a few seconds later, when it may still be tidying up: so the record comes first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: Any) -> None:
        recorder.end("stopped", 128 + number, "SIGTERM")
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is stop:
            signal.signal(signal.SIGTERM, before)


def _more(hours: float | None, num: float | None, more: float) -> float | None:
    return hours if num is None else (hours or 0.0) + num * more


def _versions() -> dict[str, str]:
    found = {"offsite_ray": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _plain(value: Any) -> Any:
    """Return what is written of a value: no address in it has a key or options."""
    return without_secrets(to_plain(value), scrubbed)


def _yaml(plain: Any) -> str:
    import yaml

    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return text
