# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: written beside training, published whole, the best and the last kept.

Each worker copies what it holds and goes on; a thread writes the copy to the run's directory. When
every worker's file is there, worker 0 gives the checkpoint its name. Until then it does not exist:
a process that is killed meanwhile leaves a ``partial-`` directory that nobody reads.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from offsite_ray.bundle import digest_file, replaced_file, sync
from offsite_ray.errors import ResumeError, StorageError
from offsite_ray.training.fragments import Fragment, FragmentReader, write_fragments

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_LOG = logging.getLogger(__name__)

STATE = "state.json"
_POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint that was published."""

    path: Path
    step: int
    """Steps done."""
    score: float | None
    """Held-out loss at this step; None where it was not measured."""

    def state(self) -> dict[str, Any]:
        """Return what worker 0 wrote beside the fragments."""
        found: dict[str, Any] = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        return found

    def intact(self, name: str, digest: str) -> bool:
        """Return whether a file is as it was written."""
        try:
            return digest_file(self.path / name) == digest
        except OSError:
            return False

    def open(self) -> FragmentReader:
        """Return the fragments.

        Raises:
            IntegrityError: A file is none of safetensors.
        """
        return FragmentReader([self.path / name for name in sorted(self.state()["files"])])


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return where a checkpoint is published."""
    return run_dir / f"checkpoint-{step:08}"


def checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Return what is published in a run's directory, in the order of steps.

    Raises:
        ResumeError: One does not say what it is.
    """
    found = []
    for path in sorted(run_dir.glob("checkpoint-*")):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            found.append(Checkpoint(path=path, step=int(state["step"]), score=state["score"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResumeError(
                f"{path} is damaged ({STATE}: {error}); remove it, and --resume goes on from the "
                "one before, or from the beginning"
            ) from error
    return found


def superfluous(published: Sequence[Checkpoint], keep_best: int) -> list[Checkpoint]:
    """Return the checkpoints that are neither the last nor among the ``keep_best`` best."""
    kept = {c.step for c in (*best_first(published)[:keep_best], *published[-1:])}
    return [c for c in published if c.step not in kept]


def best_first(published: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints with a score, the best one first; of equal ones the later."""
    scored = (c for c in published if c.score is not None)
    return sorted(scored, key=lambda c: (c.score, -c.step))


class CheckpointStore(Protocol):
    """Where checkpoints are kept beside the run's directory."""

    def put(self, checkpoint: Path) -> None:
        """Keep one; raise :class:`StorageError` where it cannot be kept."""
        ...


class CheckpointWriter:
    """Writes one worker's part of checkpoints, one at a time, beside training."""

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        world_size: int,
        keep_best: int,
        *,
        mirror: CheckpointStore | None = None,
    ) -> None:
        """Start with nothing to write.

        Args:
            run_dir: Of the run.
            rank: This worker.
            world_size: Of how many.
            keep_best: Checkpoints to keep beside the last.
            mirror: Where checkpoints are kept too; one counts when it is there.
        """
        self._mirror = mirror
        self._run_dir = run_dir
        self._rank, self._world_size = rank, world_size
        self._keep_best = keep_best
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._written = threading.Event()
        self._written.set()
        self.error: OSError | None = None
        """Why the last one could not be written."""
        self.published = 0
        """Steps of the last one that this process published; 0: none."""

    def start(self, step: int, fragments: Sequence[Fragment], state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint; the one before is written.

        Args:
            step: Steps done.
            fragments: This worker's, which nobody changes until they are written.
            state: What worker 0 writes beside them.
        """
        self._written.clear()
        self._thread = threading.Thread(
            target=self._write, args=(step, fragments, state), daemon=True
        )
        self._thread.start()

    def wait_written(self) -> None:
        """Wait until this worker's own part is written, or has failed."""
        self._written.wait()

    def join(self) -> None:
        """Wait until the checkpoint is published; every worker has written its part."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def stop(self) -> None:
        """Wait for no other worker any longer: one of them has failed."""
        self._stopped.set()
        self.join()

    def _write(self, step: int, fragments: Sequence[Fragment], state: Mapping[str, Any]) -> None:
        partial = self._run_dir / f"partial-{step:08}"
        try:
            partial.mkdir(exist_ok=True)
            name = f"worker-{self._rank:05}.safetensors"
            digest = write_fragments(partial / name, fragments)
            sync(partial / name)
            with replaced_file(partial / f"worker-{self._rank:05}.json") as marker:
                marker.write_text(json.dumps({name: digest}), encoding="utf-8")
            self._written.set()
            if self._rank == 0:
                self._publish(partial, step, state)
        except OSError as error:
            self.error = error
        finally:
            self._written.set()

    def _publish(self, partial: Path, step: int, state: Mapping[str, Any]) -> None:
        markers = [partial / f"worker-{rank:05}.json" for rank in range(self._world_size)]
        while not all(marker.is_file() for marker in markers):
            if self._stopped.wait(_POLL_SECONDS):
                return
        files: dict[str, str] = {}
        for marker in markers:
            files |= json.loads(marker.read_text(encoding="utf-8"))
            marker.unlink()
        with replaced_file(partial / STATE) as file:
            file.write_text(json.dumps({**state, "files": files}), encoding="utf-8")
        sync(partial)
        path = checkpoint_path(self._run_dir, step)
        partial.rename(path)
        sync(self._run_dir)
        try:
            if self._mirror is not None:
                self._mirror.put(path)
        except StorageError as error:  # which does not end the run: the next one may come through
            _LOG.warning("the checkpoint of step %d is on this machine alone: %s", step, error)
            return
        self.published = step

    def prune(self) -> None:
        """Remove what is superfluous; the last one is known to be good."""
        with contextlib.suppress(ResumeError):  # who resumes is told which one is damaged
            for old in superfluous(checkpoints(self._run_dir), self._keep_best):
                remove_checkpoint(old.path)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, if it is there; a process that is killed leaves no half of one.

    One that cannot be removed stays, and does no harm.
    """
    partial = path.with_name(f"partial-{path.name}")
    with contextlib.suppress(OSError):
        path.rename(partial)
        shutil.rmtree(partial)


def remove_partial(run_dir: Path) -> None:
    """Remove what a killed process left half written, or half removed."""
    for path in run_dir.glob("partial-*"):
        shutil.rmtree(path, ignore_errors=True)
