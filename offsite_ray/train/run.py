# SPDX-License-Identifier: Apache-2.0
"""Training on Ray Train with DeepSpeed ZeRO: the same loop, another engine.

Every worker builds the task's module (under ZeRO-3 each weight is cut up as soon as it is read, so
no worker holds the whole model), and the loop runs as in one process. Checkpoints and the result go
to the run's directory, which all workers must see.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import threading
import uuid
from typing import TYPE_CHECKING

from offsite_ray.cluster import check_room, embedded_ray
from offsite_ray.errors import OffsiteError, StorageError, TrainingError
from offsite_ray.repeating import repeating
from offsite_ray.results import CheckpointRecord, DevicesRecord, EvalRecord, RunStart, StepRecord
from offsite_ray.train.worker import RECORDS, RESERVED, read_result, worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from offsite_ray.config import TrainingConfig
    from offsite_ray.results import Record
    from offsite_ray.training import Report, TrainingOutcome, TrainingTask

_LOG = logging.getLogger(__name__)

_POLL_SECONDS = 0.5

_ENVIRONMENT = {
    # A worker that reports again waits until it was asked, and so does the end of a run: by default
    # every other second.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(_POLL_SECONDS),
}
"""What Ray Train reads; set where the user has not."""

_RECORD_TYPES: dict[str, Callable[..., Record]] = {
    cls.__name__: cls for cls in (StepRecord, EvalRecord, CheckpointRecord)
} | {RunStart.__name__: lambda **values: RunStart.from_plain(values)}


def run_on_ray(
    task: TrainingTask, config: TrainingConfig, run_dir: Path, report: Report
) -> TrainingOutcome:
    """Run a task on Ray Train workers, in the cluster at hand or in one of this process.

    Args:
        task: What to train.
        config: ``num_workers``, ``zero_stage`` and ``use_gpu`` say where.
        run_dir: Directory that every worker sees, e.g. on shared storage.
        report: Told of the records of worker 0 as they come.

    Raises:
        ConfigError: The cluster cannot hold the workers.
        OffsiteError: What a worker raised; the same as in this process.
        TrainingError: They failed without one of these, more often than they may.
    """
    run_dir = run_dir.resolve()
    for left in (RECORDS, RESERVED):
        (run_dir / left).unlink(missing_ok=True)
    with embedded_ray(config.num_workers), following(run_dir / RECORDS, report):
        gpu = use_gpu(config)
        check_room(config.num_workers, gpu=gpu)
        num = config.num_workers
        # Ray Train asks for a GPU for each worker, and for a CPU where it uses none.
        with devices_held(report, num_gpus=num if gpu else 0, num_cpus=0 if gpu else num):
            for attempt in range(config.max_failures + 1):
                try:
                    _fit(task, config, run_dir, gpu=gpu)
                    break
                except Exception as error:
                    if attempt == config.max_failures or not may_be_mended(error):
                        raise worker_error(error, run_dir) from error
                    _free(run_dir)
    return read_result(run_dir)


@contextlib.contextmanager
def devices_held(report: Report, *, num_gpus: int, num_cpus: int) -> Iterator[None]:
    """Report what workers hold while the block runs, and then that they hold it no more."""
    report(DevicesRecord(num_gpus=num_gpus, num_cpus=num_cpus))
    try:
        yield
    finally:
        report(DevicesRecord(num_gpus=0, num_cpus=0))


def _fit(task: TrainingTask, config: TrainingConfig, run_dir: Path, *, gpu: bool) -> None:
    """Run the workers to their end; they go on from the last checkpoint in the run's directory."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    trainer = TorchTrainer(
        worker,
        train_loop_config={
            "task": task,
            "config": config,
            "run_dir": str(run_dir),
            "num_threads": int(os.environ.get("OMP_NUM_THREADS", "0")),
        },
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=gpu),
        run_config=RunConfig(  # type: ignore[call-arg]  # typed as the one before V2
            # Ray goes on with a run of the same name on its own; here the run's directory decides.
            name=uuid.uuid4().hex,
            storage_path=str(run_dir / "ray"),
            # Ray Train would start the workers again whatever failed; the caller looks first. Only
            # workers that a preempted node takes along are started again by Ray Train itself.
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": worker_env(config.num_workers, gpu=gpu)},
        ),
    )
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit as error:
        if error.code in (0, 1):  # Ray Train's, at Ctrl-C, when its workers have ended
            raise KeyboardInterrupt from error
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _free(run_dir: Path) -> None:
    """Give back what workers of a lost controller have reserved.

    Ray Train leaves that to an actor that asks the dashboard whether the controller lives, and that
    fails where several Rays run on a machine (Ray 2.60): new workers would wait for ever.
    """
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    with contextlib.suppress(FileNotFoundError):
        name = (run_dir / RESERVED).read_text(encoding="utf-8")
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def may_be_mended(error: Exception) -> bool:
    """Return whether to start again: a worker or Ray Train's own actor is lost, or raised.

    Not where a worker raised an error of this package: it would again.
    """
    from ray.exceptions import RayActorError

    if any(isinstance(cause, OffsiteError) for cause in _causes(error)):
        return False
    return isinstance(error, RayActorError) or hasattr(error, "worker_failures")


def use_gpu(config: TrainingConfig) -> bool:
    """Return whether workers get a GPU each."""
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0 if config.use_gpu is None else config.use_gpu


def worker_env(num_workers: int, *, gpu: bool) -> dict[str, str]:
    """Return the environment of a worker, which libraries read when they are imported."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // num_workers))
    common = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return common if gpu else {**common, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": threads}


def worker_error(error: Exception, run_dir: Path) -> OffsiteError:
    """Return what failed on a worker as one line, without Ray's frame around it."""
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, OffsiteError):
            return cause
    if any(type(cause).__name__ in _LOST for cause in causes):
        return TrainingError(
            "training on Ray failed: workers died more often than --max-failures allows, out of "
            "memory or killed; --resume goes on from the last checkpoint"
        )
    full = os.strerror(errno.ENOSPC)
    if any(full in str(cause) for cause in (*causes, error)):
        return StorageError(f"{run_dir}: {full}; make room, and go on with --resume")
    lines = (str(causes[0]).strip() or type(causes[0]).__name__).splitlines()
    return TrainingError(f"training on Ray failed: {lines[-1][:500]}")


_LOST = frozenset({"ActorDiedError", "ActorUnavailableError", "WorkerHealthCheckFailedError"})
"""Errors of Ray that stand for a process that is gone."""


def _causes(error: Exception) -> list[BaseException]:
    """Return what each worker that failed raised, or what an error of Ray itself came from."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    return [_cause(failure) for failure in failures.values()]


def _cause(error: BaseException) -> BaseException:
    """Return what an error came from, the first of this package if there is one."""
    while not isinstance(error, OffsiteError):
        # Ray Train keeps what a worker raised in a frame of its own.
        inner = getattr(error, "_base_exc", None) or error.__cause__
        if inner is None:
            break
        error = inner
    return error


@contextlib.contextmanager
def following(records: Path, report: Report) -> Iterator[None]:
    """Report what worker 0 appends to a file, while the block runs and once at its end.

    What cannot be reported is left out: the workers go on, and the first time is said.
    """
    position = 0
    failed: list[Exception] = []

    def tell(line: bytes) -> None:
        try:
            kind, values = json.loads(line)
        except ValueError:  # half a line, which a killed worker left
            return
        try:
            report(_RECORD_TYPES[kind](**values))
        except Exception as error:  # a full disk, a service that does not answer
            failed.append(error)
            if len(failed) == 1:
                _LOG.warning("progress cannot be reported: %s", error)

    def read() -> None:
        nonlocal position
        if not records.exists():
            return
        with records.open("rb") as lines:
            lines.seek(position)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                tell(line)

    try:
        with repeating(read, _POLL_SECONDS, "following"):
            yield
    finally:
        read()
