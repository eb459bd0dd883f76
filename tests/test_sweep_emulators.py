# SPDX-License-Identifier: Apache-2.0
"""Emulators that jobs share: made once, taken over from who was killed, stopped for all."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.tune import sweep
from offsite_ray.tune.attempts import Silent
from offsite_ray.tune.folders import Folders
from offsite_ray.tune.planned import plan_sweep
from offsite_ray.tune.trial import run_job
from tests.conftest import ROOT
from tests.sweeps import Seen, a_config, emulator_of, run, table

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_ray.config import SweepConfig
    from offsite_ray.tune import SweepResult
    from offsite_ray.tune.bench import Shared
    from offsite_ray.tune.folders import Record
    from offsite_ray.tune.plan import Job
    from tests.loops import Loop

FINETUNE: dict[str, Any] = {"max_steps": 2, "batch_size": 2, "learning_rate": 3e-3}
SPACE: dict[str, Any] = {
    "compress": {"plan": "1-2-1"},
    "distill": {"max_steps": 2, "batch_size": 2},
    "finetune": {**FINETUNE, "method": ["full", "lora"]},
}


@pytest.fixture(scope="module")
def shared(
    loop: Loop, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SweepConfig, SweepResult, Seen]:
    """Return a sweep of two emulators and two ways to train against each; only read."""
    config = a_config(loop, tmp_path_factory.mktemp("shared") / "out", space=SPACE)
    return config, *run(config)


def emulators_in(result: SweepResult) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of emulators by the name of the emulator."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in table(result):
        if row["role"] == "emulator":
            found.setdefault(emulator_of(row), []).append(row)
    return found


def test_an_emulator_is_distilled_once_and_every_job_knows_what_it_took(
    shared: tuple[SweepConfig, SweepResult, Seen],
) -> None:
    _, result, seen = shared
    found = emulators_in(result)
    assert [len(rows) for rows in found.values()] == [2, 2]
    for rows in found.values():
        assert sum(row["id"] in {job for job, _ in seen.losses} for row in rows) == 1
        assert {row["method"] for row in rows} == {"full", "lora"}
        for name in ("compress_seconds", "distill_seconds", "distill_loss", "bundle_bytes",
                     "emulator_blocks", "emulator_zero_shot_nats", "distill_steps"):  # fmt: skip
            (value,) = {row[name] for row in rows}
            assert value is not None
        assert len({row["num_trained"] for row in rows}) == 2
        assert len({row["finetune_seconds"] for row in rows}) == 2


def test_a_job_measures_the_same_against_an_emulator_of_its_own(
    shared: tuple[SweepConfig, SweepResult, Seen], tmp_path: Path
) -> None:
    space = {**SPACE, "finetune": {**FINETUNE, "method": "lora"}}
    alone, _ = run(dataclasses.replace(shared[0], out=str(tmp_path / "out"), space=space))
    known = {row["id"]: row for row in table(shared[1])}
    own = [row for row in table(alone) if row["role"] == "emulator"]
    assert len(own) == 2
    for row in own:
        for name in ("plug_in_nats", "emulator_fine_tuned_nats", "distill_loss"):
            assert row[name] == known[row["id"]][name]


def test_an_emulator_goes_when_no_job_wants_it(loop: Loop, tmp_path: Path) -> None:
    left: list[int] = []

    class Counting(Silent):
        def ended(self, record: Record) -> None:
            left.append(len(list((tmp_path / "out" / "emulators").glob("*/bundle"))))

    space = {"compress": {"plan": ["1-1-1", "1-3-1"]}, "finetune": SPACE["finetune"]}
    config = a_config(loop, tmp_path / "out", space=space, objectives=("bytes",))
    sweep(config, lambda _: None, lambda _: Counting())
    # Yardsticks; two small ones, which stay; two large ones, behind at once, which another wants.
    assert left == [0, 0, 0, 0, 1, 2, 2, 2, 3, 4, 3, 2]


def test_a_distillation_that_is_stopped_is_stopped_for_all_that_want_it(
    loop: Loop, tmp_path: Path
) -> None:
    space = {
        "compress": {"plan": "adapter=0,5 emulator=2,3"},
        "distill": {"max_steps": 4, "eval_every": 1, "batch_size": 2,
                    "learning_rate": [1e-3, 1e-9]},
        "finetune": SPACE["finetune"],
    }  # fmt: skip
    config = a_config(
        loop, tmp_path / "out", space=space, early_stop=True, grace_steps=1, reduction_factor=2,
        keep_bundles=True,
    )  # fmt: skip
    result, seen = run(config)
    folders = Folders(tmp_path / "out")
    stopped = set()
    for name, rows in emulators_in(result).items():
        assert len(rows) == 2
        assert len({row["status"] for row in rows}) == 1
        assert sum(row["id"] in {job for job, _ in seen.losses} for row in rows) == 1
        if rows[0]["status"] == "stopped":
            stopped.add(name)
            assert list(folders.emulator(name).iterdir()) == [folders.emulator(name) / ".lock"]
    assert stopped == {file.stem for file in folders.stopped.iterdir()}
    assert len(stopped) == 1
    again, seen = run(dataclasses.replace(config, early_stop=False))
    assert len(seen.begun) == 2 * len(stopped)
    assert (again.num_stopped, again.num_failed) == (0, 0)
    assert all((folders.emulator(name) / "bundle").is_dir() for name in stopped)


WORKER = """
import json, sys
from offsite_ray.tune.bench import Shared
from offsite_ray.tune.plan import Job
from offsite_ray.tune.trial import run_job

given = json.loads(sys.argv[1])

def tell(step, losses):
    print(step, flush=True)
    if step == given["stays_at"]:
        sys.stdin.read()

run_job(Job.from_plain(given["job"]), Shared.from_plain(given["shared"]), tell)
"""
"""A job in a process of its own; at some step of its distillation it does not go on."""


def started(job: Job, shared: Shared, stays_at: int | None = None) -> subprocess.Popen[str]:
    given = {"job": job.to_plain(), "shared": shared.to_plain(), "stays_at": stays_at}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, json.dumps(given)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_who_waits_for_an_emulator_goes_on_with_it_where_its_maker_is_killed(
    loop: Loop, tmp_path: Path
) -> None:
    distill = {"max_steps": 9, "eval_every": 1, "checkpoint_every": 3, "batch_size": 2}
    space = {**SPACE, "distill": distill}
    config = a_config(loop, tmp_path / "out", space=space)
    planned = plan_sweep(config, tmp_path / "out", lambda _: None)
    first, second = (job for job in planned.jobs() if job.control == "uniform")
    assert first.emulator == second.emulator
    with started(first, planned.shared, stays_at=5) as maker:
        assert maker.stdout is not None
        assert [int(maker.stdout.readline()) for _ in range(5)] == [1, 2, 3, 4, 5]
        with started(second, planned.shared) as waiting:
            lock = planned.folders.of(second.id) / ".lock"
            while not (lock.is_file() and lock.read_text()):
                assert waiting.poll() is None
                time.sleep(0.05)
            maker.kill()
            told, _ = waiting.communicate()
    assert waiting.returncode == 0
    assert [int(step) for step in told.split()] == [4, 5, 6, 7, 8, 9]
    heard: list[int] = []
    record = run_job(first, planned.shared, lambda step, _: heard.append(step))
    assert heard == []
    other = planned.folders.record(second.id)
    assert other is not None
    assert record["found"]["distillation"] == other["found"]["distillation"]
    undisturbed, _ = run(dataclasses.replace(config, out=str(tmp_path / "undisturbed")))
    rows = {row["id"]: row for row in table(undisturbed)}
    for known in (record, other):
        nats = known["measured"]["plug_in"]["nats_per_token"]
        assert nats == rows[known["id"]]["plug_in_nats"]
