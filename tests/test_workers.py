# SPDX-License-Identifier: Apache-2.0
"""What several workers do together around a run's directory: all of them, or none."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from offsite_ray.bundle import TensorDirectory, digest_file
from offsite_ray.errors import ResumeError, StorageError
from offsite_ray.results import RunStart
from offsite_ray.training import run_here
from offsite_ray.training.checkpoints import checkpoints
from offsite_ray.training.fragments import Fragment, FragmentReader, write_fragments
from tests.loops import Loop, ignore
from tests.test_distillation import distill_task
from tests.workers import WORLD_SIZE, run_two

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_ray.distillation import DistillTask


def two(task: DistillTask, run_dir: Path, report: Any = ignore) -> list[Any]:
    return run_two(task, task.config, [run_dir] * WORLD_SIZE, [report, ignore])


@pytest.fixture
def task(loop: Loop, tmp_path: Path) -> DistillTask:
    (tmp_path / "run").mkdir()
    given = {"max_steps": 6, "checkpoint_every": 2, "eval_every": 6}
    return distill_task(loop, tmp_path, **given)


def test_two_workers_do_what_one_does(task: DistillTask, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    alone = run_here(task, task.config, tmp_path / "alone", ignore).history
    for history in two(task, tmp_path / "run"):
        ours, theirs = ([r.losses["loss"] for r in h.steps] for h in (history, alone))
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_directory_that_workers_do_not_share_is_said_at_once(
    task: DistillTask, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    both = [ignore, ignore]
    found = run_two(task, task.config, [tmp_path / "run", tmp_path / "other"], both)
    assert [type(error) for error in found] == [StorageError] * WORLD_SIZE
    assert "not every node sees" in str(found[0])
    # As stale as it may be: what another run left there is not what worker 0 wrote.
    (tmp_path / "other/seen-by-all").write_text("1")
    found = run_two(task, task.config, [tmp_path / "run", tmp_path / "other"], both)
    assert [type(error) for error in found] == [StorageError] * WORLD_SIZE


@pytest.mark.parametrize("failing", range(WORLD_SIZE))
def test_where_one_worker_cannot_write_all_say_why(
    task: DistillTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    def write(path: Path, fragments: Any) -> str:
        if path.name == f"worker-{failing:05}.safetensors" and "00000004" in path.parent.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_fragments(path, fragments)

    monkeypatch.setattr("offsite_ray.training.checkpoints.write_fragments", write)
    found = two(task, tmp_path / "run")
    assert [type(error) for error in found] == [StorageError] * WORLD_SIZE
    assert all("No space left on device; make room" in str(error) for error in found)
    assert sorted(p.name for p in (tmp_path / "run").glob("*-0*")) == ["checkpoint-00000002"]


def test_each_file_is_verified_by_one_worker_and_refused_by_all(
    task: DistillTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two(task, tmp_path / "run")
    read: list[str] = []

    def digest(path: Path) -> str:
        read.append(f"{threading.current_thread().name}: {path.name}")
        return digest_file(path)

    monkeypatch.setattr("offsite_ray.training.checkpoints.digest_file", digest)
    seen: list[Any] = []
    resumed = two(task, tmp_path / "run", seen.append)
    assert isinstance(seen[0], RunStart)
    assert seen[0].first_step == 4
    assert sorted(read) == [f"worker {r}: worker-{r:05}.safetensors" for r in range(WORLD_SIZE)]
    assert [len(history.steps) for history in resumed] == [6] * WORLD_SIZE
    last = checkpoints(tmp_path / "run")[-1].path
    (last / "worker-00001.safetensors").unlink()
    found = two(task, tmp_path / "run")
    assert [type(error) for error in found] == [ResumeError] * WORLD_SIZE
    assert all("worker-00001.safetensors is missing" in str(error) for error in found)


def test_a_trained_tensor_is_only_read_where_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.arange(6.0)

    def part(name: str, start: int, end: int) -> Fragment:
        return Fragment(kind="parameter", name=name, start=start, values=values[start:end])

    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    write_fragments(files[0], [part("whole", 0, 6), part("cut", 0, 4)])
    write_fragments(files[1], [part("cut", 4, 6)])
    reader = FragmentReader(files)
    assert torch.equal(reader.whole("cut", (2, 3)), values.view(2, 3))
    assert torch.equal(reader.read("parameter", "cut", 3, 2), values[3:5])
    monkeypatch.setattr(reader, "read", None)
    monkeypatch.setattr(TensorDirectory, "read", None)
    assert torch.equal(reader.whole("whole", (2, 3)), values.view(2, 3))


def test_the_largest_memory_is_that_of_any_worker_before_a_stop_too(
    task: DistillTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {"worker 0": 5, "worker 1": 7}

    def peak(_device: Any) -> int:
        return memory[threading.current_thread().name]

    monkeypatch.setattr("offsite_ray.training.progress.peak_memory", peak)
    assert [h.peak_memory_bytes for h in two(task, tmp_path / "run")] == [7, 7]
    memory["worker 1"] = 3
    assert [h.peak_memory_bytes for h in two(task, tmp_path / "run")] == [7, 7]
