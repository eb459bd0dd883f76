# SPDX-License-Identifier: Apache-2.0
"""Sweeps on Ray Tune: the same results, and trials or the whole sweep that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

from offsite_ray.tune import sweep
from offsite_ray.tune.folders import Folders
from offsite_ray.tune.halving import Halving
from offsite_ray.tune.plan import Planner
from tests.conftest import ROOT
from tests.sweeps import Seen, a_config, emulator_of, run, table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offsite_ray.tune.plan import Job
    from tests.loops import Loop

pytestmark = pytest.mark.slow

SPACE: dict[str, Any] = {
    "compress": {"plan": "1-2-1"},
    "distill": {"max_steps": 2, "batch_size": 2},
    "finetune": {"max_steps": 2, "batch_size": 2, "learning_rate": 3e-3},
}
SAME = ("id", "plug_in_nats", "bound_nats", "emulator_fine_tuned_nats", "utility_gap")


def test_trials_of_tune_measure_what_one_process_does(
    ray_cluster: None, loop: Loop, tmp_path: Path
) -> None:
    here, _ = run(a_config(loop, tmp_path / "here", space=SPACE))
    there, seen = run(a_config(loop, tmp_path / "there", space=SPACE, max_concurrent=2))
    assert there.num_finished == here.num_finished == 5
    assert [[row[name] for name in SAME] for row in table(there)] == [
        [row[name] for name in SAME] for row in table(here)
    ]
    assert len(seen.begun) == len(set(seen.begun)) == len(seen.records) == 5
    assert {step for _, step in seen.losses} == {1, 2}
    assert not (tmp_path / "there" / ".ray").exists()
    again, seen = run(a_config(loop, tmp_path / "there", space=SPACE, max_concurrent=2))
    assert seen.begun == []
    assert table(again) == table(there)


def test_a_trial_whose_distillation_wants_ray_train_is_its_driver(
    ray_cluster: None, loop: Loop, tmp_path: Path
) -> None:
    space = {**SPACE, "distill": {**SPACE["distill"], "num_workers": 2}}
    result, seen = run(a_config(loop, tmp_path / "out", space=space, num_cpus=0.5))
    assert result.num_failed == 0
    rows = [row for row in table(result) if row["role"] == "emulator"]
    assert len(rows) == 2
    assert all(row["distill_steps"] == 2 for row in rows)
    assert len({step for _, step in seen.losses}) == 2


def test_tune_stops_distillations_that_are_behind(
    ray_cluster: None, loop: Loop, tmp_path: Path
) -> None:
    space = {
        "compress": {"plan": "adapter=0,5 emulator=2,3"},
        "distill": {"max_steps": 9, "eval_every": 1, "batch_size": 2, "lm_weight": 0.0,
                    "learning_rate": [1e-2, 1e-9]},
        "finetune": {**SPACE["finetune"], "method": ["full", "lora"]},
    }  # fmt: skip
    config = a_config(
        loop, tmp_path / "out", space=space, early_stop=True, grace_steps=3, reduction_factor=2,
        max_concurrent=2,
    )  # fmt: skip
    result, seen = run(config)
    stopped = [row for row in table(result) if row["status"] == "stopped"]
    # Two or four: whoever comes to a rung first is behind nobody, and that may be a control.
    assert 0 < len(stopped) == result.num_stopped <= 4
    assert result.num_failed == 0
    ends: dict[str, set[str]] = {}
    for row in table(result):
        if row["role"] == "emulator":
            ends.setdefault(emulator_of(row), set()).add(row["status"])
    assert all(len(statuses) == 1 for statuses in ends.values())
    assert len(seen.losses) <= 9 * len(ends)
    assert all(row["control"] is None and row["plug_in_nats"] is None for row in stopped)
    folders = Folders(tmp_path / "out")
    left = [p for r in stopped for p in folders.emulator(emulator_of(r)).glob("*bundle*")]
    assert left == []
    _, seen = run(config)
    assert seen.begun == []


def test_the_process_of_a_trial_is_used_again_only_where_none_is_stopped(tmp_path: Path) -> None:
    from ray.tune.search import Searcher

    from offsite_ray.tune.on_ray import tune_config

    planner = Planner(num_blocks=6, seeds=[0], baseline={})
    halving = Halving(
        folder=str(tmp_path), grace_steps=1, reduction_factor=2, proxy="loss", planner=planner
    )
    assert tune_config(Searcher(), None, 2).reuse_actors
    assert not tune_config(Searcher(), halving, 2).reuse_actors


def offsite_ray(loop: Loop, out: Path, **changes: Any) -> subprocess.Popen[str]:
    """Start a sweep as a user does; its process is the leader of a group of its own."""
    config = {
        "model": str(loop.model), "private": [str(loop.text)], "public": [str(loop.rows)],
        "text": [str(loop.text)], "seq_len": 16, "space": SPACE, "seeds": 2, "max_concurrent": 2,
    }  # fmt: skip
    file = out.with_suffix(".json")
    file.write_text(json.dumps({**config, **changes}))
    words = ["sweep", "--config", str(file), "--out", str(out), "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", "offsite_ray", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def finished(out: Path) -> dict[str, int]:
    files = Folders(out).trials.glob("*/result.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in files}


def test_a_killed_sweep_goes_on_with_what_is_left(loop: Loop, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = offsite_ray(loop, out)
    wait_for(lambda: len(finished(out)) >= 4, process)
    process.kill()
    process.communicate()
    before = finished(out)
    again = offsite_ray(loop, out)
    said, told = again.communicate(timeout=400)
    assert again.returncode == 0, told
    result = json.loads(said)
    after = finished(out)
    assert result["num_finished"] == len(after) == 1 + 2 * 4
    assert result["num_failed"] == 0
    assert {name: after[name] for name in before} == before


@pytest.mark.long
def test_an_interrupted_sweep_leaves_its_results(loop: Loop, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = offsite_ray(loop, out)
    wait_for(lambda: any(name.startswith("emulator") for name in finished(out)), process)
    os.kill(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 130, told
    assert "jobs are left; the same command goes on with them" in told
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert 0 < len(rows) < 9
    assert {row["status"] for row in rows} == {"finished"}
    assert (out / "report.html").is_file()
    assert (out / "winner" / "recipe.yaml").is_file()


class Killing(Seen):
    """Kills the process of each attempt at a bound, and of the first at full fine-tuning."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def started(self, job: Job) -> None:
        super().started(job)
        first = self.begun.count(job.id) == 1
        if job.role == "bound" or (job.role == "fine_tuned" and first):
            threading.Thread(target=self._kill, args=(job,), daemon=True).start()

    def _kill(self, job: Job) -> None:
        lock = Folders(self._root).of(job.id) / ".lock"
        known = lock.read_text() if lock.is_file() else ""
        while not lock.is_file() or lock.read_text() in ("", known):
            time.sleep(0.01)
        os.kill(int(lock.read_text()), signal.SIGKILL)


@pytest.mark.long
def test_a_trial_that_is_killed_is_run_again_and_then_reported(
    ray_cluster: None, loop: Loop, tmp_path: Path
) -> None:
    config = a_config(
        loop,
        tmp_path / "out",
        space={**SPACE, "distill": {"max_steps": 0}},
        baseline={"max_steps": 60},
        max_concurrent=1,
    )
    watch = Killing(tmp_path / "out")
    result = sweep(config, lambda _: None, lambda _: watch)
    by_role = {(row["role"], row["control"]): row for row in table(result)}
    assert by_role["fine_tuned", None]["status"] == "finished"
    assert by_role["bound", None]["status"] == "failed"
    assert "process was lost" in by_role["bound", None]["error"]
    assert by_role["emulator", "uniform"]["status"] == "finished"
    assert by_role["emulator", "tail"]["bound_gap"] is None
    begun = [name.partition("-")[0] for name in watch.begun]
    assert (begun.count("fine_tuned"), begun.count("bound")) == (2, 2)
    assert (result.num_finished, result.num_failed) == (4, 1)
