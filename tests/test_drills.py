# SPDX-License-Identifier: Apache-2.0
"""Fault drills: what is killed or broken on the way ends where the undisturbed run ends."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.distillation import distill
from offsite_ray.emulator import open_bundle
from offsite_ray.errors import DivergedError, ResumeError, StorageError
from offsite_ray.results import Record, StepRecord
from offsite_ray.training import TorchEngine, TrainingOutcome, run_here, training_loop
from tests.drills import GIVEN, STEPS, config, wait_for, weights
from tests.loops import Loop, Stopped, ignore, stop_after

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offsite_ray.training import Fit


@pytest.mark.parametrize(("step", "good"), [(13, 10), (11, 5)])
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(
    loop: Loop, tmp_path: Path, step: int, good: int
) -> None:
    """The checkpoint of step 10 is not good where step 11 shows that its weights are no numbers."""
    out = tmp_path / "out"
    with pytest.raises(DivergedError, match=f"the loss of step {step} is nan; try a lower"):
        distill(config(loop, out), poisoned_at(step), ignore)
    kept = [path.name for path in (tmp_path / ".out.run").glob("*-0*")]
    assert kept == [f"checkpoint-{good:08}"]
    again = config(loop, out, resume=True, learning_rate=1e-3)
    result = distill(again, run_here, ignore)
    assert len(result.history.steps) == STEPS
    recipe = open_bundle(out).manifest.recipe["distillation"]
    assert recipe["changes"] == [{"from_step": good, "learning_rate": 1e-3, "max_grad_norm": 1.0}]


def test_a_gradient_that_is_no_number_ends_the_run(loop: Loop, tmp_path: Path) -> None:
    """Of a loss that is one: what the optimizer would make of it is no state to go on from."""

    class Overflowing(TorchEngine):
        num_steps = 0

        def step(self, learning_rate: float) -> float:
            self.num_steps += 1
            if self.num_steps == 8:
                gradient = next(iter(self.trained.values())).grad
                assert gradient is not None
                gradient[0] = float("inf")
            return super().step(learning_rate)

    def fit(task: Any, given: Any, run_dir: Path, report: Any) -> TrainingOutcome:
        engine = Overflowing(task, given)
        history = training_loop(task, engine, given, run_dir, report)
        return TrainingOutcome(history=history, state=engine.gather())

    with pytest.raises(DivergedError, match="the gradient norm of step 8 is inf"):
        distill(config(loop, tmp_path / "out"), fit, ignore)
    kept = [path.name for path in (tmp_path / ".out.run").glob("*-0*")]
    assert kept == ["checkpoint-00000005"]


def test_a_kill_while_an_old_checkpoint_is_removed_blocks_no_resume(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(config(loop, tmp_path / "straight"), run_here, ignore)
    out = tmp_path / "out"

    rmtree = shutil.rmtree

    def killed(directory: Path, **given: Any) -> None:
        if not directory.name.endswith("checkpoint-00000005"):
            rmtree(directory, **given)
            return
        (directory / "state.json").unlink()
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("offsite_ray.training.checkpoints.shutil.rmtree", killed)
        with pytest.raises(Stopped):
            distill(config(loop, out), run_here, ignore)
    seen: list[Any] = []
    distill(config(loop, out, resume=True), run_here, seen.append)
    assert seen[0].first_step == 10
    assert weights(out) == weights(tmp_path / "straight")


def test_a_finished_run_has_nothing_to_resume(loop: Loop, tmp_path: Path) -> None:
    """Also where its driver was killed before it had removed what the run had kept."""
    out = tmp_path / "out"
    given = config(loop, out, max_steps=2, resume=True)
    distill(given, run_here, ignore)
    (tmp_path / ".out.run/checkpoint-00000001").mkdir(parents=True)
    before = weights(out)
    with pytest.raises(StorageError, match="out is finished, so there is nothing to resume"):
        distill(given, run_here, ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert weights(out) == before


def poisoned_at(step: int) -> Fit:
    """Return what runs a task in this process, with a weight that is no number at some step."""

    def fit(task: Any, given: Any, run_dir: Path, report: Any) -> TrainingOutcome:
        engine = TorchEngine(task, given)

        def poison(record: Record) -> None:
            if isinstance(record, StepRecord) and record.step == step - 1:
                next(iter(engine.trained.values())).data.fill_(float("nan"))
            report(record)

        history = training_loop(task, engine, given, run_dir, poison)
        return TrainingOutcome(history=history, state=engine.gather())

    return fit


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


WEIGHTS = "worker-00000.safetensors"


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (WEIGHTS, truncate),
        (WEIGHTS, alter),
        (WEIGHTS, remove),
        ("state.json", truncate),
        ("state.json", remove),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    loop: Loop, tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    distill(config(loop, tmp_path / "straight"), run_here, ignore)
    out = tmp_path / "out"
    given = {"keep_best": 3, "eval_every": 5}
    with pytest.raises(Stopped):
        distill(config(loop, out, **given), run_here, stop_after(13))
    run_dir = tmp_path / ".out.run"
    kept = sorted(path.name for path in run_dir.glob("checkpoint-*"))
    assert kept == ["checkpoint-00000005", "checkpoint-00000010"]
    damage(run_dir / kept[-1] / file)
    with pytest.raises(ResumeError, match=r"checkpoint-00000010 is damaged.*remove it"):
        distill(config(loop, out, **given, resume=True), run_here, ignore)
    shutil.rmtree(run_dir / kept[-1])
    seen: list[Any] = []
    distill(config(loop, out, **given, resume=True), run_here, seen.append)
    assert seen[0].first_step == 5
    assert weights(out) == weights(tmp_path / "straight")


def test_the_best_checkpoints_and_the_last_are_kept(loop: Loop, tmp_path: Path) -> None:
    given = {"keep_best": 2, "max_steps": 12, "checkpoint_every": 2, "learning_rate": 0.3}
    kept: list[set[int]] = []

    def look(record: Record) -> None:
        if isinstance(record, StepRecord):
            found = (tmp_path / ".out.run").glob("checkpoint-*")
            kept.append({int(path.name.split("-")[1]) for path in found})

    result = distill(config(loop, tmp_path / "out", **given), run_here, look)
    scores = {
        e.step: e.losses["loss"] for e in result.history.evaluations if e.step in range(2, 12, 2)
    }
    assert set(scores) == {2, 4, 6, 8, 10}
    best = sorted(scores, key=lambda step: scores[step])[:2]
    assert kept[-1] == {*best, 10}


def test_the_best_state_can_be_the_result(loop: Loop, tmp_path: Path) -> None:
    given = {"keep_best": 1, "eval_every": 5}
    with pytest.raises(Stopped):
        distill(config(loop, tmp_path / "out", **given), run_here, stop_after(32))
    worse = {**given, "result": "best", "resume": True, "learning_rate": 3.0}
    result = distill(config(loop, tmp_path / "out", **worse), run_here, ignore)
    losses = {e.step: e.losses["loss"] for e in result.history.evaluations}
    best = min(losses.values())
    assert losses[30] == best < losses[STEPS] / 10
    assert result.history.result_step == 30
    assert result.last_losses["loss"] == best
    measured = open_bundle(tmp_path / "out").manifest.measured
    assert measured["distillation_losses"]["loss"] == best
    again = config(loop, tmp_path / "again", bundle=str(tmp_path / "out"), max_steps=1)
    assert distill(again, run_here, ignore).first_losses["loss"] == pytest.approx(best, rel=1e-5)


def test_a_killed_writer_leaves_no_checkpoint_that_counts(loop: Loop, tmp_path: Path) -> None:
    """kill -9 at a random moment of a process that does little but write checkpoints."""
    given = {**GIVEN, "num_workers": 0, "model": loop.model, "bundle": loop.bundle}
    given |= {"data": loop.text, "checkpoint_every": 1, "max_steps": 2000, "eval_every": 2000}
    words = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    command = [sys.executable, "-m", "offsite_ray", "distill", *words, "--resume"]
    command.append(f"--out={tmp_path / 'out'}")
    run_dir = tmp_path / ".out.run"
    before = 0
    for _ in range(2):
        before = newest_after_a_kill(command, run_dir, before)


def newest_after_a_kill(command: list[str], run_dir: Path, before: int) -> int:
    log = run_dir.parent / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    wait_for(lambda: newest(run_dir) > before or process.poll() is not None)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, log.read_text()
    assert newest(run_dir) > before
    return newest(run_dir)


def newest(run_dir: Path) -> int:
    return max((int(p.name.split("-")[1]) for p in run_dir.glob("checkpoint-*")), default=0)
