# SPDX-License-Identifier: Apache-2.0
"""Where the numbers of a run go beside the terminal: a table of places."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from offsite_ray.bundle import storage_errors
from offsite_ray.errors import ConfigError, StorageError, unknown_name
from offsite_ray.results import EvalRecord, Record, RunStart, StepRecord, to_plain
from offsite_ray.uris import refuse_uri, without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from offsite_ray.config import TrainingConfig
    from offsite_ray.results import Report

METRICS_FILE = "metrics.jsonl"


class Place(Protocol):
    """Something that takes numbers."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step, by name."""
        ...

    def close(self) -> None:
        """Take no more."""
        ...


class JsonLines:
    """A line for each step and evaluation, in ``metrics.jsonl``."""

    def __init__(self, directory: Path) -> None:
        """Begin the file anew."""
        self._file = (directory / METRICS_FILE).open("w", encoding="utf-8", buffering=1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line."""
        self._file.write(json.dumps({"step": step, **to_plain(values)}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """TensorBoard's event files."""

    def __init__(self, directory: Path) -> None:
        """Begin anew: TensorBoard drops what is in older files."""
        self._writer = event_writer(directory, purge_step=0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a point for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


def event_writer(directory: Path, **options: Any) -> Any:
    """Return a ``tensorboardX.SummaryWriter`` that overwrites no file.

    Its files are named after the second: of two that are begun within one, the latter would take
    the place of the former.
    """
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(directory), filename_suffix=f".{time.time_ns()}", **options)


class Wandb:
    """A run of Weights & Biases, by its environment variables."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Start a run."""
        import wandb

        self._run = wandb.init(config=dict(settings))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class Mlflow:
    """A run of MLflow, by its environment variables."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Start a run."""
        import mlflow

        self._mlflow = mlflow
        mlflow.start_run()
        mlflow.log_params(dict(settings))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


SERVICES: dict[str, Callable[[Mapping[str, Any]], Place]] = {"wandb": Wandb, "mlflow": Mlflow}
"""What ``--report-to`` names to what starts a run there, given the run's settings."""


@contextlib.contextmanager
def logged(config: TrainingConfig, report: Report, record: Path | None = None) -> Iterator[Report]:
    """Give a report that also writes to the log directory and to services.

    Args:
        config: Names them.
        report: Told of everything.
        record: Directory of the run's record, in which ``metrics.jsonl`` is written too.

    Raises:
        ConfigError: A service is unknown or not installed.
        StorageError: The log directory cannot be made or written to.
    """
    for name in config.report_to:
        if name not in SERVICES:
            raise ConfigError(unknown_name("--report-to", name, SERVICES))
    refuse_uri("--log-dir", config.log_dir)
    services = [_service(name, without_secrets(to_plain(config))) for name in config.report_to]
    files: list[Place] = []

    def both(step: Record) -> None:
        try:
            if isinstance(step, RunStart):  # once more for workers that were started again
                _close(files)
                files[:] = _files(config.log_dir, record)
                # From the run's own history: who logged before may have been killed behind it.
                for earlier in step.earlier:
                    _write(files, earlier)
            else:
                _write((*services, *files), step)
        finally:
            report(step)

    try:
        if config.log_dir is not None:
            _make_directory(Path(config.log_dir))
        yield both
    finally:
        _close((*services, *files))


def _close(places: Sequence[Place]) -> None:
    for place in places:
        with contextlib.suppress(OSError):  # what cannot be written was said when it was tried
            place.close()


def _make_directory(path: Path) -> None:
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise StorageError(f"{path} may not be written to; choose another --log-dir")


def _service(name: str, settings: Mapping[str, Any]) -> Place:
    try:
        return SERVICES[name](settings)
    except ImportError as error:
        raise ConfigError(f"--report-to {name} needs the package {name}; pip install it") from error


def _files(log_dir: str | None, record: Path | None) -> Sequence[Place]:
    found: list[Place] = [] if record is None else [JsonLines(record)]
    if log_dir is not None:
        directory = Path(log_dir)
        found += [JsonLines(directory), TensorBoard(directory)]
    return found


def _write(places: Sequence[Place], record: Record) -> None:
    if values := metrics_of(record):
        for place in places:
            place.write(record.step, values)  # type: ignore[union-attr]  # no start has values


def metrics_of(record: Record) -> dict[str, float]:
    """Return the numbers of a step (``train/...``) or an evaluation (``eval/...``) by name."""
    if isinstance(record, StepRecord):
        measured = {
            "learning_rate": record.learning_rate,
            "grad_norm": record.grad_norm,
            "tokens_per_s": record.tokens_per_s,
            "flops_utilisation": record.flops_utilisation,
            "peak_memory_bytes": record.peak_memory_bytes,
        }
        known = {name: value for name, value in measured.items() if value is not None}
        return {f"train/{name}": value for name, value in {**record.losses, **known}.items()}
    if isinstance(record, EvalRecord):
        return {f"eval/{n}": value for n, value in {**record.losses, **record.diagnostics}.items()}
    return {}
