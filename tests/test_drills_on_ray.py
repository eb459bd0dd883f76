# SPDX-License-Identifier: Apache-2.0
"""Fault drills on Ray Train: what is killed or full on the way ends as the undisturbed run does."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from offsite_ray.distillation import DistillResult, distill
from offsite_ray.errors import StorageError, TrainingError
from offsite_ray.results import Record, RunStart, StepRecord
from offsite_ray.train import run_on_ray
from offsite_ray.training import run_here
from tests.disks import small_disk
from tests.drills import GIVEN, SHARDED, STEPS, config, curve, wait_for, weights
from tests.loops import Loop, Stopped, ignore, start_of, stop_after

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_ray.training import Fit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DistillResult]:
    """Return the run on two workers, at ZeRO stage 3, that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return out, distill(config(loop, out, **SHARDED), run_on_ray, ignore)


def command_line(process: psutil.Process) -> str:
    """Return how a process was started or calls itself; nothing of one that is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


class Killer:
    """A report that kills -9 one process of Ray Train at some step, once."""

    def __init__(self, name: str, step: int) -> None:
        self.name, self.step = name, step
        self.killed: list[str] = []
        self.starts: list[int] = []

    def __call__(self, record: Record) -> None:
        if isinstance(record, RunStart):
            self.starts.append(record.first_step)
        if self.killed or not isinstance(record, StepRecord) or record.step < self.step:
            return
        for process in psutil.Process().children(recursive=True):
            line = command_line(process)
            if self.name in line:
                process.send_signal(signal.SIGKILL)
                self.killed.append(line)
                return


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "name", ["RayTrainWorker", pytest.param("TrainController", marks=pytest.mark.long)]
)
def test_a_killed_worker_or_controller_is_started_again(
    loop: Loop, undisturbed: tuple[Path, DistillResult], tmp_path: Path, name: str
) -> None:
    """Bit for bit, without a hand, and not from the beginning."""
    reference, expected = undisturbed
    step = random.randrange(11, STEPS // 2)  # the first checkpoint is there
    print(f"killing {name} from step {step}")
    killer = Killer(name, step)
    result = distill(config(loop, tmp_path / "out", **SHARDED), run_on_ray, killer)
    assert len(killer.killed) == 1
    assert killer.starts[0] == 0
    assert killer.starts[-1] > 0
    assert curve(result) == curve(expected)
    assert result.history.evaluations == expected.history.evaluations
    assert weights(tmp_path / "out") == weights(reference)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.long
def test_a_killed_driver_goes_on_by_the_same_command(
    loop: Loop, undisturbed: tuple[Path, DistillResult], tmp_path: Path
) -> None:
    reference, _ = undisturbed
    given = {**GIVEN, **SHARDED, "model": loop.model, "bundle": loop.bundle, "data": loop.text}
    words = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    command = [sys.executable, "-m", "offsite_ray", "distill", *words, "--resume", "--json"]
    command.append(f"--out={tmp_path / 'out'}")
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    run_dir = tmp_path / ".out.run"
    wait_for(lambda: bool(list(run_dir.glob("checkpoint-*"))) or driver.poll() is not None)
    family = psutil.Process(driver.pid).children(recursive=True)
    workers = [process for process in family if "RayTrainWorker" in command_line(process)]
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert (len(gone), alive) == (2, [])
    assert not (tmp_path / "out").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"60 steps, from step [1-9]", done.stderr), done.stderr
    assert json.loads(done.stdout)["history"]["steps"][0]["step"] == 1
    assert weights(tmp_path / "out") == weights(reference)


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_other_workers_stages_and_engines_go_on(
    loop: Loop, undisturbed: tuple[Path, DistillResult], tmp_path: Path
) -> None:
    """From two workers at stage 3 to one at stage 2, and to this process; and back to two."""
    _, expected = undisturbed
    out = tmp_path / "a" / "out"
    with pytest.raises(TrainingError, match="--max-failures"):
        distill(
            config(loop, out, **SHARDED, max_failures=0), run_on_ray, Killer("RayTrainWorker", 11)
        )
    run_dir = out.parent / ".out.run"
    last = max(run_dir.glob("checkpoint-*"))
    ways: list[tuple[str, Fit, dict[str, Any]]] = [
        ("b", run_on_ray, {"num_workers": 1, "zero_stage": 2}),
        ("c", run_here, {"num_workers": 0}),
    ]
    for folder, fit, given in ways:
        shutil.copytree(run_dir, tmp_path / folder / ".out.run")
        seen: list[Any] = []
        result = distill(
            config(loop, tmp_path / folder / "out", **given, resume=True), fit, seen.append
        )
        assert start_of(seen).first_step == int(last.name.split("-")[1])
        assert [losses["loss"] for losses in curve(result)] == pytest.approx(
            [losses["loss"] for losses in curve(expected)], rel=1e-3
        )


@pytest.mark.usefixtures("ray_cluster")
def test_from_this_process_to_two_workers(loop: Loop, tmp_path: Path) -> None:
    straight = distill(config(loop, tmp_path / "straight"), run_here, ignore)
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        distill(config(loop, out), run_here, stop_after(12))
    given = {"num_workers": 2, "zero_stage": 2, "resume": True}
    result = distill(config(loop, out, **given), run_on_ray, ignore)
    assert curve(result)[:10] == curve(straight)[:10]
    assert [losses["loss"] for losses in curve(result)] == pytest.approx(
        [losses["loss"] for losses in curve(straight)], rel=1e-3
    )


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_a_full_disk_on_workers_is_said_and_the_last_good_state_goes_on(
    loop: Loop, undisturbed: tuple[Path, DistillResult], tmp_path: Path
) -> None:
    reference, _ = undisturbed
    disk = tmp_path / "disk"
    disk.mkdir()
    out = disk / "out"
    filler = disk / "filler"

    def fill(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step >= 20 and not filler.exists():
            with filler.open("wb") as file:
                try:
                    while True:
                        os.write(file.fileno(), bytes(2**16))
                except OSError:
                    return

    with small_disk(disk, 64 * 2**20):
        if not disk.is_mount():
            pytest.skip("a limit on the size of files holds for no worker, and no disk is mounted")
        with pytest.raises(StorageError, match="No space left on device"):
            distill(config(loop, out, **SHARDED, checkpoint_every=2), run_on_ray, fill)
        assert list((disk / ".out.run").glob("checkpoint-*"))
        filler.unlink()
        seen: list[Any] = []
        distill(config(loop, out, **SHARDED, resume=True), run_on_ray, seen.append)
        assert start_of(seen).first_step > 0
        assert weights(out) == weights(reference)
