# SPDX-License-Identifier: Apache-2.0
"""Ray Train with DeepSpeed: the same numbers as in one process, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ray.train import UserCallback, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from torch.utils import cpp_extension

from offsite_ray.bundle import TensorDirectory
from offsite_ray.config import DistillConfig, FinetuneConfig
from offsite_ray.distillation import DistillResult, distill
from offsite_ray.errors import ConfigError, DataError, OffsiteError, StorageError, TrainingError
from offsite_ray.finetuning import finetune
from offsite_ray.results import (
    DevicesRecord,
    EvalRecord,
    StepRecord,
    TrainingHistory,
    to_plain,
)
from offsite_ray.train import run_on_ray
from offsite_ray.train.extension import _drop_left
from offsite_ray.train.run import following, may_be_mended, worker_error
from offsite_ray.train.worker import metrics_for_ray, own_threads, write_result
from offsite_ray.training import TrainingOutcome, run_here
from offsite_ray.training.metrics import metrics_of
from tests.conftest import ROOT
from tests.loops import Loop, ignore, start_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from offsite_ray.training import Fit

on_ray = pytest.mark.usefixtures("ray_cluster")
pytestmark = pytest.mark.slow

CLOSE = 3e-4
"""A tenth of the learning rate: Adam's first steps are long where a gradient is but rounding."""


def run(loop: Loop, out: Path, fit: Fit, **changes: Any) -> DistillResult:
    given = {"max_steps": 6, "batch_size": 4, "seq_len": 32, "learning_rate": 3e-3, **changes}
    config = DistillConfig(
        model=str(loop.model),
        bundle=str(loop.bundle),
        data=(str(loop.text),),
        out=str(out),
        **given,
    )
    return distill(config, fit, ignore)


@dataclass
class Listener(UserCallback):
    """Keeps what Ray Train is told, on its own actor, in a file."""

    file: Path

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        """Take what each worker reported."""
        with self.file.open("a") as lines:
            lines.write(json.dumps(metrics) + "\n")


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Return the file of what Ray Train is told, for each of its runs."""
    files: list[Path] = []
    fit = TorchTrainer.fit

    def watched(trainer: Any) -> Any:
        files.append(tmp_path / f"told-{len(files)}")
        trainer.run_config.callbacks = [*(trainer.run_config.callbacks or ()), Listener(files[-1])]
        return fit(trainer)

    monkeypatch.setattr(TorchTrainer, "fit", watched)
    return files


def losses(result: DistillResult) -> list[float]:
    return [record.losses["loss"] for record in result.history.steps]


def largest_difference(a: Path, b: Path) -> float:
    left, right = TensorDirectory.of_model(a), TensorDirectory.of_model(b)
    assert set(left.tensors) == set(right.tensors)
    return max(
        float((left.read(name).float() - right.read(name).float()).abs().max())
        for name in left.tensors
    )


@pytest.fixture(scope="module")
def here(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DistillResult]:
    """Return the run that all others must equal: one process, no Ray."""
    out = tmp_path_factory.mktemp("here") / "out"
    return out, run(loop, out, run_here, num_workers=0)


@on_ray
@pytest.mark.parametrize(
    ("workers", "stage", "micro", "offload"),
    [
        (1, 0, None, "none"),
        pytest.param(2, 0, 1, "none", marks=pytest.mark.long),
        (2, 1, None, "optimizer"),
        (2, 2, 1, "none"),
        pytest.param(2, 3, None, "none", marks=pytest.mark.long),
        (2, 3, None, "all"),
    ],
)
def test_workers_and_stages_do_not_change_the_result(
    loop: Loop,
    here: tuple[Path, DistillResult],
    tmp_path: Path,
    workers: int,
    stage: int,
    micro: int | None,
    offload: str,
) -> None:
    reference, expected = here
    given: dict[str, Any] = {"num_workers": workers, "zero_stage": stage, "micro_batch_size": micro}
    given |= {"offload": offload}
    result = run(loop, tmp_path / "out", run_on_ray, **given)
    assert losses(result) == pytest.approx(losses(expected), rel=1e-4)
    assert result.last_losses == pytest.approx(expected.last_losses, rel=1e-4)
    assert largest_difference(tmp_path / "out", reference) < CLOSE
    assert norms(result) == pytest.approx(norms(expected), rel=1e-3)


def norms(result: DistillResult) -> list[float | None]:
    return [record.grad_norm for record in result.history.steps]


@on_ray
def test_bf16_masters_and_reports(loop: Loop, tmp_path: Path, fitted: list[Path]) -> None:
    seen: list[Any] = []
    outcomes: list[TrainingOutcome] = []

    def fit(*given: Any) -> TrainingOutcome:
        outcomes.append(run_on_ray(*given))
        return outcomes[-1]

    config = FinetuneConfig(
        bundle=str(loop.bundle),
        data=(str(loop.rows),),
        out=str(tmp_path / "out"),
        method="lora",
        max_steps=4,
        batch_size=4,
        seq_len=32,
        learning_rate=1e-2,
        dtype="bf16",
        num_workers=2,
        zero_stage=2,
    )
    result = finetune(config, fit, seen.append)
    held = [record for record in seen if isinstance(record, DevicesRecord)]
    assert held == [
        DevicesRecord(num_gpus=0, num_cpus=2),
        DevicesRecord(num_gpus=0, num_cpus=0),
    ]
    # Half precision would have rounded what a step changes away.
    (masters,) = (outcome.state for outcome in outcomes)
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
    assert not any(torch.equal(t, t.bfloat16().float()) for t in masters.values())
    assert result.first_loss is not None
    assert result.last_loss is not None
    assert result.last_loss < result.first_loss
    assert start_of(seen).total_steps == 4
    assert [r.step for r in seen if isinstance(r, StepRecord)] == [1, 2, 3, 4]
    evaluations = [record for record in seen if isinstance(record, EvalRecord)]
    assert len(evaluations) == 5
    # Ray Train has the same: the last evaluation, and the step before it.
    (last,) = (record for record in seen if isinstance(record, StepRecord) and record.step == 4)
    expected = {"step": 4, **metrics_of(last), **metrics_of(evaluations[-1])}
    (file,) = fitted
    told = [json.loads(line) for line in file.read_text().splitlines()]
    assert told[-1] == [{**expected, "steps": [to_plain(last)]}, {}]
    assert [of_worker_0["step"] for of_worker_0, _ in told] == [0, 1, 2, 3, 4]


def test_ray_is_told_every_step_since_the_last_evaluation() -> None:
    steps = [StepRecord(step=n, losses={"loss": 1.0 / n}, learning_rate=0.1) for n in (3, 4)]
    told = metrics_for_ray(EvalRecord(step=4, losses={"loss": 0.3}), steps)
    flat = {"step": 4, "train/loss": 0.25, "train/learning_rate": 0.1, "eval/loss": 0.3}
    assert told == {**flat, "steps": [to_plain(step) for step in steps]}
    assert metrics_for_ray(EvalRecord(step=0, losses={"loss": 2.0}), []) == {
        "step": 0,
        "eval/loss": 2.0,
        "steps": [],
    }


@on_ray
def test_more_workers_than_the_cluster_holds(loop: Loop, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="64 workers need 64 CPUs"):
        run(loop, tmp_path / "out", run_on_ray, num_workers=64, batch_size=64)
    assert list(tmp_path.iterdir()) == []


@on_ray
@pytest.mark.parametrize(
    ("model", "kind", "said"),
    [
        (None, TrainingError, "try a lower --learning-rate"),
        ("nowhere", StorageError, "nowhere"),
    ],
)
def test_an_error_on_a_worker_is_one_line_and_ends_the_run(
    loop: Loop,
    tmp_path: Path,
    fitted: list[Path],
    model: str | None,
    kind: type[OffsiteError],
    said: str,
) -> None:
    """Of the loop, or before it begins: a model that is not on the worker's node."""

    def fit(task: Any, *given: Any) -> TrainingOutcome:
        return run_on_ray(task if model is None else replace(task, model=model), *given)

    with pytest.raises(kind, match=said) as caught:
        run(loop, tmp_path / "out", fit, num_workers=1, learning_rate=1e30)
    assert "\n" not in str(caught.value)
    assert len(fitted) == 1  # it is not tried again
    assert not list(tmp_path.glob("*out*"))


def raised(*errors: BaseException) -> WorkerGroupError:
    """Return what Ray Train makes of the errors of its workers."""
    frames = (UserExceptionWithTraceback(error, "Traceback: a page") for error in errors)
    return WorkerGroupError("a page", dict(enumerate(frames)))


def test_only_what_starting_again_may_mend_is_started_again(tmp_path: Path) -> None:
    ours = raised(RuntimeError("Connection closed by peer"), DataError("one block"))
    assert not may_be_mended(ours)
    assert str(worker_error(ours, tmp_path)) == "one block"
    assert type(worker_error(ours, tmp_path)) is DataError
    lost = raised(RuntimeError("Connection closed by peer"))
    assert may_be_mended(lost)
    assert str(worker_error(lost, tmp_path)).endswith("failed: Connection closed by peer")
    assert not may_be_mended(ValueError("not of a worker"))


def test_what_cannot_be_reported_is_left_out_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [StepRecord(step=n, losses={}, learning_rate=0.1) for n in (1, 2, 3, 4)]
    lines = [json.dumps(["StepRecord", to_plain(record)]) for record in records]
    # Worker 0 was killed within a line; the next one begins behind it.
    text = "\n".join([*lines[:3], lines[3][:9], "", lines[3], ""])
    told: list[int] = []

    def report(record: Any) -> None:
        told.append(record.step)
        if record.step in (1, 2):
            raise OSError("no space")

    def fail_while_followed() -> None:
        with following(tmp_path / "records", report):
            (tmp_path / "records").write_text(text)
            raise TrainingError("the reason")

    with pytest.raises(TrainingError, match="the reason"):
        fail_while_followed()
    assert told == [1, 2, 3, 4]
    assert [record.getMessage() for record in caplog.records] == [
        "progress cannot be reported: no space"
    ]


def test_a_result_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    engine: Any = SimpleNamespace(rank=0, reduce=list)
    (tmp_path / "result").write_text("in the way")
    with pytest.raises(StorageError, match="File exists; make room, and go on with --resume"):
        write_result(tmp_path / "result", engine, TrainingHistory())


def test_workers_share_the_cores_of_their_own_node(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert own_threads() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(4 * cores))
    assert own_threads() == 1


_BUILD = """
import os, sys
os.environ.update(DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=sys.argv[1])
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
from offsite_ray.train.extension import build_extension
try:
    build_extension()
    print("built")
except Exception as error:
    print(type(error).__name__, error)
"""


def build(folder: Path, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
    )
    return done.stdout.splitlines()[-1]


def leave_lock(folder: Path) -> None:
    """Leave what a killed build leaves."""
    (folder / "deepspeed_shm_comm").mkdir(parents=True, exist_ok=True)
    (folder / "deepspeed_shm_comm/lock").touch()


def reuse(folder: Path) -> None:
    """Take over what is built already, so that a build is none."""
    leave_lock(folder)
    built = Path(cpp_extension.get_default_build_root()).glob("py*_cpu/deepspeed_shm_comm")
    for directory in built:
        shutil.copytree(directory, folder / directory.name, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("prepare", "environ", "said"),
    [
        (reuse, {}, "built"),
        (leave_lock, {"CXX": "false"}, "TrainingError DeepSpeed's extension cannot be compiled: "),
    ],
)
def test_the_extension_is_built_whatever_a_killed_build_left(
    tmp_path: Path, prepare: Callable[[Path], None], environ: dict[str, str], said: str
) -> None:
    prepare(tmp_path)
    line = build(tmp_path, **environ)
    assert line.startswith(said)
    assert ("install a C++ compiler" in line) == (said != "built")


def test_the_lock_of_a_build_that_goes_on_is_left(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (10**9, 10**9))
    with subprocess.Popen(["sleep", "3"], cwd=tmp_path) as ninja:
        started = time.monotonic()
        _drop_left(lock)
        assert ninja.poll() is not None, "waited for"
    assert not lock.exists()
    assert time.monotonic() - started > 1
    _drop_left(lock)  # none is there
