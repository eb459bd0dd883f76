# SPDX-License-Identifier: Apache-2.0
"""The records and checkpoints of a run, and the directory that they are in."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.bundle import made_parent, storage_error
from offsite_ray.errors import DivergedError, ResumeError, StorageError
from offsite_ray.results import EvalRecord, StepRecord, TrainingHistory, to_plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from offsite_ray.config import TrainingConfig
    from offsite_ray.training.protocols import Engine, Report, TrainingTask
    from offsite_ray.training.schedule import Schedule

_STATE = "state.json"

_TORCH_WRITER = "inline_container"
"""What torch names in place of the reason, where the file system takes no more of a file."""

_FREE_TO_CHANGE = frozenset(
    {"resume", "num_workers", "micro_batch_size", "use_gpu", "out", "checkpoint_every"}
)
"""Settings with which a resumed run may differ from the one that was stopped."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system answers that has no locks."""


def identity_of(task: TrainingTask, config: TrainingConfig, plan: Schedule) -> dict[str, Any]:
    """Return what two runs must have in common for one to go on with the other's checkpoint."""
    given = {k: v for k, v in to_plain(config).items() if k not in _FREE_TO_CHANGE}
    plain = {"task": task.fingerprint(), "config": given, "total_steps": plan.total_steps}
    same: dict[str, Any] = json.loads(json.dumps(plain))
    return same


class Progress:
    """The records of a run and its checkpoints, of which only the latest is kept."""

    def __init__(
        self, run_dir: Path, engine: Engine, report: Report, identity: Mapping[str, Any]
    ) -> None:
        """Start with no record."""
        self._run_dir = run_dir
        self._engine = engine
        self._report = report
        self._identity = identity
        self.steps: list[StepRecord] = []
        """Every step of the run so far, those before a resume too."""
        self._evaluations: list[EvalRecord] = []
        self._seconds = 0.0

    def add(self, record: StepRecord | EvalRecord) -> None:
        """Keep a record and report it."""
        if isinstance(record, StepRecord):
            self.steps.append(record)
        else:
            self._evaluations.append(record)
        self._report(record)

    def history(self, seconds: float) -> TrainingHistory:
        """Return everything so far; ``seconds`` since this process began."""
        return TrainingHistory(
            steps=tuple(self.steps),
            evaluations=tuple(self._evaluations),
            seconds=self._seconds + seconds,
            peak_memory_bytes=peak_memory(self._engine.device),
        )

    def checkpoint(self, step: int, seconds: float) -> None:
        """Write a checkpoint and remove the one before.

        Raises:
            StorageError: It cannot be written; the one before stays.
        """
        partial = self._run_dir / f"partial-{step:08}"
        try:
            self._checkpoint(partial, step, seconds)
        except (OSError, RuntimeError) as error:
            if not isinstance(error, OSError) and _TORCH_WRITER not in str(error):
                raise
            shutil.rmtree(partial, ignore_errors=True)
            reason = getattr(error, "strerror", None) or "No space left on device"
            raise StorageError(
                f"the checkpoint of step {step} cannot be written to {self._run_dir}: {reason}"
            ) from error

    def _checkpoint(self, partial: Path, step: int, seconds: float) -> None:
        target = self._run_dir / f"checkpoint-{step:08}"
        if self._engine.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._engine.reduce([0.0])  # a barrier: the directory is there
        self._engine.save(partial)
        self._engine.reduce([0.0])  # a barrier: every worker has written
        if self._engine.rank == 0:
            state = {
                "step": step,
                "world_size": self._engine.world_size,
                "identity": self._identity,
                "history": to_plain(self.history(seconds)),
            }
            (partial / _STATE).write_text(json.dumps(state), encoding="utf-8")
            old = sorted(self._run_dir.glob("checkpoint-*"))
            partial.rename(target)
            for directory in old:
                if directory != target:
                    shutil.rmtree(directory, ignore_errors=True)
        self._engine.reduce([0.0])  # a barrier: nobody goes on before it counts

    def resume(self) -> int:
        """Load the latest checkpoint; return its step, or 0 where there is none.

        Raises:
            ResumeError: It is of another run, or of another number of workers.
        """
        found = sorted(self._run_dir.glob("checkpoint-*"))
        if not found:
            return 0
        state = json.loads((found[-1] / _STATE).read_text(encoding="utf-8"))
        if state["identity"] != self._identity:
            raise ResumeError(
                f"{found[-1]} is of a run with other settings: {_changed(state, self._identity)}; "
                f"resume with the same, or remove {self._run_dir} to start anew"
            )
        if state["world_size"] != self._engine.world_size:
            raise ResumeError(
                f"{found[-1]} was written by {state['world_size']} workers, and its optimizer "
                f"state is cut to that; resume with --num-workers {state['world_size']}"
            )
        self._engine.load(found[-1])
        history = TrainingHistory.from_plain(state["history"])
        self.steps, self._evaluations = list(history.steps), list(history.evaluations)
        self._seconds = history.seconds or 0.0
        return int(state["step"])


def _changed(state: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """Return the first setting in which a checkpoint differs, in words."""
    for part in ("config", "task"):
        before, after = state["identity"].get(part, {}), identity[part]
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                return f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
    return f"{state['identity'].get('total_steps')} steps and now {identity['total_steps']}"


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far: allocated on a GPU, resident in this process else."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def run_directory(out: Path, resume: bool) -> Iterator[Path]:
    """Yield where a run keeps its data and checkpoints, beside its result.

    Removed on success, and where a run diverges or fails before its first checkpoint.

    Raises:
        StorageError: One is left by a run that was stopped, and ``resume`` is not asked for; or
            another run is at work in it.
    """
    run_dir = out.parent / f".{out.name}.run"
    with made_parent(run_dir):
        try:
            run_dir.mkdir(exist_ok=True)
        except OSError as error:
            raise storage_error(out, error) from error
        with _alone(run_dir, out):
            stopped = any(run_dir.glob("checkpoint-*"))
            if stopped and not resume:
                raise StorageError(
                    f"{run_dir} is left by a run that was stopped; go on with --resume, or remove "
                    "it to start anew"
                )
            if not stopped:
                # Nothing says by which settings the data in it was made.
                _empty(run_dir)
            try:
                yield run_dir
            except BaseException as error:
                if isinstance(error, DivergedError) or not any(run_dir.glob("checkpoint-*")):
                    shutil.rmtree(run_dir, ignore_errors=True)
                raise
            shutil.rmtree(run_dir, ignore_errors=True)


@contextlib.contextmanager
def _alone(run_dir: Path, out: Path) -> Iterator[None]:
    """Hold a lock on a directory, which goes with the process however it ends."""
    directory = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"another run is writing {out}; wait for its end, or choose another --out"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise storage_error(out, error) from error
        yield
    finally:
        os.close(directory)


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
