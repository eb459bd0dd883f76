# SPDX-License-Identifier: Apache-2.0
"""The records and checkpoints of a run, and the directory that they are in."""

from __future__ import annotations

import errno
import json
import os
import secrets
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import BundleError, IntegrityError, ResumeError, StorageError
from offsite_ray.results import CheckpointRecord, EvalRecord, StepRecord, TrainingHistory, to_plain
from offsite_ray.training.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    best_first,
    checkpoint_path,
    checkpoints,
    remove_checkpoint,
    remove_partial,
)
from offsite_ray.training.devices import peak_memory
from offsite_ray.uris import without_secrets

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from offsite_ray.config import TrainingConfig
    from offsite_ray.results import Record, Report
    from offsite_ray.training.mirror import Mirror
    from offsite_ray.training.protocols import Engine, TrainingTask
    from offsite_ray.training.schedule import Schedule

FREE_TO_CHANGE = frozenset(
    {
        "checkpoint_every",
        "compile",
        "dry_run",
        "gradient_checkpointing",
        "keep_best",
        "log_dir",
        "max_failures",
        "micro_batch_size",
        "num_workers",
        "offload",
        "out",
        "peak_tflops",
        "report_to",
        "result",
        "resume",
        "use_gpu",
        "zero_stage",
    }
)
"""Settings with which a resumed run may differ from the one that was stopped, without a trace."""

TO_BE_TOLD = ("learning_rate", "max_grad_norm")
"""Settings that a resumed run may change too, e.g. after it diverged; the recipe says so."""

_SEEN_BY_ALL = "seen-by-all"
"""File by which workers know that they share the run's directory."""


def identity_of(task: TrainingTask, config: TrainingConfig, plan: Schedule) -> dict[str, Any]:
    """Return what two runs must have in common for one to go on with the other's checkpoint."""
    plain = without_secrets(to_plain(config))
    given = {k: v for k, v in plain.items() if k not in FREE_TO_CHANGE}
    told = {name: given.pop(name) for name in TO_BE_TOLD}
    both = {
        "task": task.fingerprint(),
        "config": given,
        "told": told,
        "total_steps": plan.total_steps,
    }
    same: dict[str, Any] = json.loads(json.dumps(both))
    return same


class Progress:
    """The records of a run and its checkpoints."""

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        report: Report,
        identity: Mapping[str, Any],
        keep_best: int,
        mirror: Mirror | None = None,
    ) -> None:
        """Start with no record."""
        self._run_dir = run_dir
        self._engine = engine
        self._report = report
        self._identity = identity
        self._mirror = mirror
        self._writer = CheckpointWriter(
            run_dir, engine.rank, engine.world_size, keep_best, mirror=mirror
        )
        self._told = 0
        self._changes: list[dict[str, Any]] = []
        self.steps: list[StepRecord] = []
        """Every step of the run so far, those before a resume too."""
        self.evaluations: list[EvalRecord] = []
        """Every evaluation so far."""
        self._seconds = 0.0
        self._peak_memory = 0

    @property
    def earlier(self) -> tuple[StepRecord | EvalRecord, ...]:
        """Every record so far, in the order of the steps."""
        records: list[StepRecord | EvalRecord] = [*self.steps, *self.evaluations]
        return tuple(sorted(records, key=lambda record: record.step))

    def add(self, record: StepRecord | EvalRecord) -> None:
        """Keep a record and report it."""
        if isinstance(record, StepRecord):
            self.steps.append(record)
        else:
            self.evaluations.append(record)
        self.tell(record)
        if self._writer.published > self._told:
            self._told = self._writer.published
            path = checkpoint_path(self._run_dir, self._told)
            self.tell(CheckpointRecord(step=self._told, path=str(path)))
            # Only now: a step was done from these weights, so they are good to go on from.
            self._writer.prune()

    def tell(self, record: Record) -> None:
        """Report a record; where it cannot be written, all workers stop at the next step."""
        try:
            self._report(record)
        except OSError as error:
            self._writer.error = error

    def history(self, seconds: float) -> TrainingHistory:
        """Return everything so far; ``seconds`` since this process began. All workers call it."""
        return TrainingHistory(
            steps=tuple(self.steps),
            evaluations=tuple(self.evaluations),
            changes=tuple(self._changes),
            seconds=self._seconds + seconds,
            peak_memory_bytes=max(
                self._peak_memory, *map(int, self._of_each(peak_memory(self._engine.device)))
            ),
        )

    @property
    def failed(self) -> float:
        """1 where this worker could not write its part of a checkpoint, else 0; to be summed."""
        return float(self._writer.error is not None)

    def raise_failure(self) -> None:
        """Raise what kept a worker from writing, on all of them, as :class:`StorageError`."""
        self._writer.stop()
        error = self._writer.error
        # A barrier too: nobody writes any longer to what is removed.
        codes = self._of_each(0 if error is None else error.errno or errno.EIO)
        if self._engine.rank == 0:
            remove_partial(self._run_dir)
        place = (error and error.filename) or self._run_dir
        reason = os.strerror(int(next(filter(None, codes))))
        raise StorageError(f"{place}: {reason}; make room, and go on with --resume")

    def _of_each(self, value: float) -> list[float]:
        """Return a value of each worker, in their order."""
        ranks = range(self._engine.world_size)
        return self._engine.reduce([value if r == self._engine.rank else 0 for r in ranks])

    def checkpoint(self, step: int, seconds: float) -> None:
        """Begin to write a checkpoint, which counts when all of it is there.

        Raises:
            StorageError: This one (or the one before) cannot be written; older ones stay.
        """
        measured = [e for e in self.evaluations if e.step == step]
        state = {
            "step": step,
            "score": measured[-1].losses["loss"] if measured else None,
            "identity": self._identity,
            "history": to_plain(self.history(seconds)),
        }
        self.settle()
        self._writer.start(step, self._engine.fragments(), state)
        if not self._engine.copies:
            self.settle()

    def settle(self) -> None:
        """Wait until the last checkpoint is published; raise as :meth:`checkpoint` does."""
        self._writer.wait_written()
        if any(self._engine.reduce([self.failed])):
            self.raise_failure()
        self._writer.join()

    def diverged(self) -> None:
        """Remove the checkpoint of the weights that the last step left, if there is one.

        They give no loss that is a number, whatever the learning rate; those before them may.
        """
        self.settle()
        if self._engine.rank == 0:
            path = checkpoint_path(self._run_dir, len(self.steps))
            remove_checkpoint(path)
            if self._mirror is not None:
                self._mirror.remove(path.name)
        self._engine.reduce([0.0])  # a barrier: a worker that ends may take the others with it

    def stop(self) -> None:
        """Wait for what this process is writing; other workers may be gone."""
        self._writer.stop()

    def resume(self) -> int:
        """Load the latest checkpoint; return its step, or 0 where there is none.

        Raises:
            ResumeError: It is of another run, or damaged.
            StorageError: The workers do not share the run's directory.
        """
        if self._engine.rank == 0:
            remove_partial(self._run_dir)
        self._check_shared()  # a barrier too: nothing is removed later
        found = checkpoints(self._run_dir)
        if not found:
            return 0
        state = found[-1].state()
        if problem := _changed(state["identity"], self._identity):
            raise ResumeError(
                f"{found[-1].path} is of a run with other settings: {problem}; "
                f"resume with the same, or remove {self._run_dir} to start anew"
            )
        self.load(found[-1])
        history = TrainingHistory.from_plain(state["history"])
        self.steps, self.evaluations = list(history.steps), list(history.evaluations)
        self._changes = [dict(change) for change in history.changes]
        before, now = state["identity"]["told"], self._identity["told"]
        if before != now:
            self._changes.append({"from_step": found[-1].step, **now})
        self._seconds = history.seconds or 0.0
        self._peak_memory = history.peak_memory_bytes or 0
        self._told = self._writer.published = found[-1].step
        return found[-1].step

    def _check_shared(self) -> None:
        """Refuse a directory of which each node has its own, where workers would wait for ever."""
        if self._engine.world_size == 1:
            return
        file = self._run_dir / _SEEN_BY_ALL
        number = 0
        if self._engine.rank == 0:
            number = secrets.randbits(32)
            try:
                file.write_text(str(number), encoding="utf-8")
            except OSError as error:
                self._writer.error = error
        number, failed = map(int, self._engine.reduce([number, self.failed]))
        if failed:
            self.raise_failure()
        seen = file.is_file() and file.read_text(encoding="utf-8") == str(number)
        if any(self._engine.reduce([float(not seen)])):
            raise StorageError(
                f"not every node sees {self._run_dir}; put --out (of a URI, XDG_CACHE_HOME) on "
                "storage that all nodes share"
            )

    def best(self, last_loss: float) -> Checkpoint | None:
        """Return the checkpoint with the lowest held-out loss, if it is below ``last_loss``."""
        self._engine.reduce([0.0])  # a barrier: worker 0 has published the last one
        best = next(iter(best_first(checkpoints(self._run_dir))), None)
        return best if best is not None and (best.score or 0.0) < last_loss else None

    def load(self, checkpoint: Checkpoint) -> None:
        """Put the engine where a checkpoint was written.

        Raises:
            ResumeError: The checkpoint is damaged.
        """
        try:
            if broken := self._broken(checkpoint):
                raise IntegrityError(f"{broken[0]} is missing or was altered")
            self._engine.restore(checkpoint.open().read, checkpoint.step)
        except (OSError, BundleError) as error:
            raise ResumeError(
                f"{checkpoint.path} is damaged: {error}; remove it, and --resume goes on from the "
                "one before, or from the beginning"
            ) from error

    def _broken(self, checkpoint: Checkpoint) -> list[str]:
        """Return the files that are not as they were written; each worker reads its share."""
        files = sorted(checkpoint.state()["files"].items())
        rank, world_size = self._engine.rank, self._engine.world_size
        found = [
            float(place % world_size == rank and not checkpoint.intact(*file))
            for place, file in enumerate(files)
        ]
        return [
            name for (name, _), bad in zip(files, self._engine.reduce(found), strict=True) if bad
        ]


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Return the first setting in which a checkpoint differs, in words; None: in none."""
    for part in ("config", "task"):
        before, after = old.get(part, {}), new[part]
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                return f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
    if old.get("total_steps") != new["total_steps"]:
        return f"{old.get('total_steps')} steps and now {new['total_steps']}"
    return None
