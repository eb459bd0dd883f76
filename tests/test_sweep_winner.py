# SPDX-License-Identifier: Apache-2.0
"""The winner of a sweep: its bundle, the recipe that makes it again, the result in short."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest

from offsite_ray.cli.arguments import parse
from offsite_ray.cli.verbs import VERBS
from offsite_ray.emulator import open_bundle
from offsite_ray.errors import OffsiteError
from offsite_ray.tune import sweep
from offsite_ray.tune.attempts import Silent
from offsite_ray.tune.finish import finish
from offsite_ray.tune.folders import Folders
from offsite_ray.tune.plan import Job, Planner
from offsite_ray.tune.planned import plan_sweep
from offsite_ray.tune.recipe import PrunedToo, recipe_of_job, recipe_text
from offsite_ray.tune.trial import base_record
from tests.conftest import ROOT
from tests.sweeps import a_config

if TYPE_CHECKING:
    from offsite_ray.config import SweepConfig
    from offsite_ray.tune import SweepResult
    from offsite_ray.tune.folders import Record
    from tests.loops import Loop


@pytest.fixture(scope="module")
def won(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepConfig, SweepResult]:
    """Return a sweep whose winner is distilled; only read."""
    space = {
        "compress": {"plan": "1-2-1"},
        "distill": {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-2},
        "finetune": {"max_steps": 2, "batch_size": 2},
    }
    out = tmp_path_factory.mktemp("won") / "out"
    config = a_config(loop, out, space=space, objectives=("plug_in",))
    return config, sweep(config, lambda _: None, lambda _: Silent())


def distill_job(root: Path, recipe: str) -> None:
    """Run the job on a recipe; it must succeed."""
    command = [sys.executable, str(ROOT / "jobs" / "distill.py")]
    words = ["--root", str(root), "--config", recipe]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr


def test_the_winners_recipe_makes_its_emulator_again(
    won: tuple[SweepConfig, SweepResult], tmp_path: Path
) -> None:
    winner = Path(won[1].recipe or "")
    recipe = str(winner / "recipe.yaml")
    for verb in ("compress", "prepare", "distill", "finetune"):
        parse(VERBS[verb], ["--config", recipe], VERBS)
    distill_job(tmp_path, recipe)
    again, won_bundle = open_bundle(tmp_path / "emulator"), open_bundle(winner / "bundle")
    assert again.plan == won_bundle.plan
    for name in won_bundle.weights.tensors:
        assert again.weights.read(name).equal(won_bundle.weights.read(name))


def test_the_recipe_of_an_emulator_that_is_not_distilled_distils_nothing(
    won: tuple[SweepConfig, SweepResult], tmp_path: Path
) -> None:
    config = dataclasses.replace(won[0], public=(), space={"compress": {"plan": "1-2-1"}})
    shared = plan_sweep(
        dataclasses.replace(config, out=str(tmp_path / "out")), tmp_path / "out", lambda _: None
    ).shared
    job = Job(role="emulator", settings={"compress": {"plan": "1-2-1"}, "finetune": {}}, seed=0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(job, config, shared), encoding="utf-8")
    (tmp_path / "again").mkdir()
    distill_job(tmp_path / "again", str(recipe))
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"bundle"}
    fine_tuned = parse(VERBS["finetune"], ["--config", str(recipe)], VERBS).config
    assert fine_tuned.bundle == "bundle"


def test_data_that_are_prepared_already_are_not_prepared_again(
    won: tuple[SweepConfig, SweepResult], tmp_path: Path
) -> None:
    prepared = Path(won[0].out) / "shared" / "public"
    config = dataclasses.replace(won[0], public=(str(prepared),), out=str(tmp_path / "out"))
    planned = plan_sweep(config, tmp_path / "out", lambda _: None)
    (job,) = (j for j in planned.jobs() if j.control == "uniform")
    recipe = recipe_of_job(job, config, planned.shared)
    assert list(recipe) == ["compress", "distill", "finetune"]
    assert recipe["distill"]["data"] == [str(prepared)]


def test_the_result_is_plain_and_says_how_much_to_distil(
    won: tuple[SweepConfig, SweepResult],
) -> None:
    from offsite_ray.results import to_plain

    plain = json.loads(json.dumps(to_plain(won[1])))
    rows = pq.read_table(plain["table"]).to_pylist()
    best = min(r["plug_in_nats"] for r in rows if r["role"] == "emulator")
    assert plain["plug_in"] == best
    assert {row["distill_steps"] for row in plain["distillation"]} == {3}
    assert plain["distil"].startswith("3 steps of 2 emulator blocks")


def test_a_winner_that_cannot_be_made_again_costs_no_report(
    won: tuple[SweepConfig, SweepResult], tmp_path: Path
) -> None:
    root = tmp_path / "out"
    shutil.copytree(won[0].out, root)
    planned = plan_sweep(dataclasses.replace(won[0], out=str(root)), root, lambda _: None)
    shutil.rmtree(root / "winner")
    (root / "report.html").unlink()
    for bundle in (root / "emulators").glob("*/bundle"):
        shutil.rmtree(bundle)
    interrupted = finish(planned, 0.0, whole=False)
    assert (interrupted.recipe, interrupted.winner is None) == (None, False)
    assert not list((root / "emulators").glob("*/bundle"))
    (root / "report.html").unlink()
    for folder in (root / "emulators").iterdir():
        (folder / "compressed").write_text("in the way, as if the disk had refused")
    with pytest.raises(OffsiteError):
        finish(planned, 0.0)
    assert "is chosen" in (root / "report.html").read_text(encoding="utf-8")


def test_a_bundle_that_was_removed_is_made_again(won: tuple[SweepConfig, SweepResult]) -> None:
    config, result = won
    before = open_bundle(Path(result.recipe or "") / "bundle")
    tensors = {name: before.weights.read(name).clone() for name in before.weights.tensors}
    for bundle in (Path(config.out) / "emulators").glob("*/bundle"):
        shutil.rmtree(bundle)
    again = sweep(config, lambda _: None, lambda _: Silent())
    after = open_bundle(Path(again.recipe or "") / "bundle")
    assert all(after.weights.read(name).equal(tensor) for name, tensor in tensors.items())


def test_bundles_that_are_behind_go_before_the_sweep_ends(loop: Loop, tmp_path: Path) -> None:
    left: list[int] = []

    class Counting(Silent):
        def ended(self, record: Record) -> None:
            left.append(len(list((tmp_path / "out" / "emulators").glob("*/bundle"))))

    space = {"compress": {"plan": ["1-3-1", "1-1-1"]}, "finetune": {"max_steps": 1}}
    config = a_config(loop, tmp_path / "out", space=space, objectives=("bytes",))
    sweep(config, lambda _: None, lambda _: Counting())
    # Yardsticks, two large bundles, and two small ones that no large one is left beside.
    assert left == [0, 0, 0, 1, 2, 1, 2]


def test_nothing_is_taken_from_a_job_that_is_run_again(tmp_path: Path) -> None:
    folders, planner = Folders(tmp_path), Planner(num_blocks=6, seeds=(0,), baseline={})
    again, other = planner.jobs([{"compress.plan": "1-2-1"}])[-2:]
    folders.write_record(again.id, base_record(again, "stopped"))
    watch = PrunedToo(folders, planner, ("bytes",), (), Silent())
    emulator = folders.emulator(again.emulator or "")
    (folders.of(again.id) / "adapter").mkdir()
    (emulator / "compressed").mkdir(parents=True)
    watch.started(again)
    watch.ended(base_record(other, "stopped"))
    assert (folders.of(again.id) / "adapter").is_dir()
    assert (emulator / "compressed").is_dir()
    watch.ended(base_record(again, "stopped"))
    assert not (folders.of(again.id) / "adapter").exists()
    assert not (emulator / "compressed").exists()
