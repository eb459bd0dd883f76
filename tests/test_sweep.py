# SPDX-License-Identifier: Apache-2.0
"""Sweeps of tiny models: every job once, its controls beside it, whatever happens meanwhile."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest

from offsite_ray.config import CompressConfig
from offsite_ray.data import open_prepared
from offsite_ray.emulator import compress, open_bundle
from offsite_ray.errors import StorageError
from offsite_ray.results import SETTINGS
from offsite_ray.tune import SweepResult, sweep
from offsite_ray.tune.folders import Folders, once
from offsite_ray.tune.plan import Job
from offsite_ray.tune.planned import plan_sweep
from offsite_ray.tune.recipe import recipe_of_job
from offsite_ray.tune.table import COLUMNS
from tests.loops import ignore
from tests.sweeps import SPACE, Seen, a_config, emulator_of, run, table
from tests.tensorboard_events import points

if TYPE_CHECKING:
    from offsite_ray.config import SweepConfig
    from offsite_ray.tune.folders import Record
    from tests.loops import Loop


@pytest.fixture(scope="module")
def done(
    loop: Loop, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SweepConfig, SweepResult, Seen]:
    """Return a whole sweep of two points, distilled and not, with two seeds; only read."""
    config = a_config(loop, tmp_path_factory.mktemp("sweep") / "out", seeds=2)
    return config, *run(config)


def test_every_job_runs_once_and_is_in_the_table(
    done: tuple[SweepConfig, SweepResult, Seen],
) -> None:
    _, result, seen = done
    rows = table(result)
    assert len(seen.begun) == len(set(seen.begun)) == len(rows) == result.num_finished
    assert (result.num_failed, result.num_stopped) == (0, 0)
    roles = [row["role"] for row in rows]
    assert {role: roles.count(role) for role in roles} == {
        "full": 1,
        "fine_tuned": 2,
        "bound": 4,
        "emulator": 2 * (2 + 3),
    }
    assert all(list(row) == list(COLUMNS) for row in rows)
    assert all(row["status"] == "finished" and row["error"] is None for row in rows)


def test_the_gaps_of_a_row_are_those_of_its_own_seed_and_placement(
    done: tuple[SweepConfig, SweepResult, Seen],
) -> None:
    rows = table(done[1])
    bounds = {
        (row["seed"], row["adapter_blocks"]): row["bound_nats"]
        for row in rows
        if row["role"] == "bound"
    }
    tuned = {
        row["seed"]: row["full_fine_tuned_nats"] for row in rows if row["role"] == "fine_tuned"
    }
    assert len(set(bounds.values())) == 4
    for row in (row for row in rows if row["role"] == "emulator"):
        bound = bounds[row["seed"], row["adapter_blocks"]]
        plug_in = row["plug_in_nats"]
        assert row["bound_nats"] == bound
        assert row["bound_gap"] == pytest.approx(plug_in - bound)
        assert row["utility_gap"] == pytest.approx(plug_in - tuned[row["seed"]])
        assert row["privacy_gap"] == pytest.approx(row["emulator_fine_tuned_nats"] - plug_in)
        gain = row["full_zero_shot_nats"] - bound
        assert row["bound_share"] == pytest.approx((row["full_zero_shot_nats"] - plug_in) / gain)
        assert row["bundle_bytes"] < row["full_model_bytes"]
        assert row["distill_steps"] in (0, 2)
        assert (row["distill_loss"] is None) == (row["distill_steps"] == 0)


def test_tensorboard_has_a_run_of_every_job_with_the_numbers_of_the_table(
    done: tuple[SweepConfig, SweepResult, Seen],
) -> None:
    config, result, seen = done
    runs = Folders(Path(config.out)).tensorboard
    assert {path.name for path in runs.iterdir()} == set(seen.begun)
    for row in table(result):
        found = points(runs / row["id"])
        for setting in SETTINGS:
            nats, name = row[f"{setting}_nats"], f"nats_per_token/{setting}"
            if row["role"] == "emulator" and setting in ("plug_in", "emulator_fine_tuned"):
                ((step, value),) = found[name]
                assert step == row["distill_steps"]
                assert value == pytest.approx(nats, rel=1e-6)
        steps = [step for job, step in seen.losses if job == row["id"]]
        assert [step for step, _ in found.get("distill/loss", [])] == steps
    assert seen.losses


def test_a_plug_in_is_that_of_the_verbs(done: tuple[SweepConfig, SweepResult, Seen]) -> None:
    from offsite_ray.config import CompressConfig, EvaluateConfig, FinetuneConfig
    from offsite_ray.emulator import compress
    from offsite_ray.evaluation import evaluate
    from offsite_ray.finetuning import finetune
    from offsite_ray.training import run_here

    config, result, _ = done
    root = Path(config.out).parent
    bundle, adapter = str(root / "by-hand"), str(root / "by-hand-adapter")
    compress(CompressConfig(model=config.model, plan="1-2-1", out=bundle, seed=1))
    finetune(
        FinetuneConfig(
            bundle=bundle, data=config.private, out=adapter, seq_len=16, seed=1, max_steps=2,
            batch_size=2, learning_rate=3e-3,
        ),
        run_here,
        ignore,
    )  # fmt: skip
    measured = evaluate(
        EvaluateConfig(
            model=config.model, bundle=bundle, adapter=adapter, text=config.text, seq_len=16
        )
    )
    plug_in = measured.settings["plug_in"]
    assert plug_in is not None
    assert plug_in.perplexity is not None
    (row,) = (
        row
        for row in table(result)
        if (row["control"], row["seed"], row["distill_steps"], row["num_adapter_blocks"])
        == ("uniform", 1, 0, 2)
    )
    assert row["plug_in_nats"] == plug_in.perplexity.nats_per_token
    assert row["privacy_gap"] == pytest.approx(measured.gaps.privacy)


def test_what_is_done_is_not_run_again_and_more_seeds_add_to_it(
    done: tuple[SweepConfig, SweepResult, Seen], tmp_path: Path
) -> None:
    config, result, _ = done
    copy = tmp_path / "out"
    shutil.copytree(config.out, copy)
    again, seen = run(dataclasses.replace(config, out=str(copy)))
    assert seen.begun == []
    assert table(again) == table(result)
    more, seen = run(dataclasses.replace(config, out=str(copy), seeds=3))
    assert {name.rpartition("seed")[2] for name in seen.begun} == {"2"}
    assert more.num_finished == result.num_finished + len(seen.begun)


def test_a_sweep_of_something_else_is_refused(
    done: tuple[SweepConfig, SweepResult, Seen], loop: Loop
) -> None:
    with pytest.raises(StorageError, match="is a sweep with seq_len=16, not 32"):
        run(dataclasses.replace(done[0], seq_len=32))


def test_only_bundles_worth_having_are_kept(done: tuple[SweepConfig, SweepResult, Seen]) -> None:
    config, result, _ = done
    folders = Folders(Path(config.out))
    kept = {path.parent.name for path in folders.emulators.glob("*/bundle")}
    assert 0 < len(kept) < 10
    assert not list(folders.emulators.glob("*/compressed"))
    assert not list(folders.trials.glob("*/bundle"))
    assert not list(folders.trials.glob("*/adapter"))
    assert not list(folders.trials.glob("*/keep-all"))
    assert not list(folders.trials.glob("*/fine-tuned"))
    open_bundle(folders.winner / "bundle")
    assert result.recipe == str(folders.winner)


def test_a_job_that_fails_ends_nothing_else_and_is_tried_anew(loop: Loop, tmp_path: Path) -> None:
    space = {"compress": {"plan": "1-2-1"}, "finetune": SPACE["finetune"]}
    config = a_config(loop, tmp_path / "out", space=space, retries=1)

    class Spoiling(Seen):
        def started(self, job: Job) -> None:
            super().started(job)
            # what the bound needs is in its way, as if the disk had refused
            if job.role == "bound":
                blocked = Folders(tmp_path / "out").of(job.id) / "keep-all"
                blocked.parent.mkdir(parents=True, exist_ok=True)
                blocked.write_text("in the way")

    result = sweep(config, lambda _: None, lambda _: Spoiling())
    assert (result.num_failed, result.num_finished) == (1, 4)  # full, fine-tuned, two drops
    (failed,) = (row for row in table(result) if row["status"] == "failed")
    assert failed["role"] == "bound"
    assert failed["error"]
    (emulator,) = (r for r in table(result) if r["control"] == "uniform")
    assert emulator["bound_gap"] is None
    assert emulator["utility_gap"] is not None
    for blocked in (tmp_path / "out" / "trials").glob("bound-*/keep-all"):
        blocked.unlink()
    result, seen = run(config)
    assert [name.partition("-")[0] for name in seen.begun] == ["bound"]
    assert result.num_failed == 0


def test_distillations_that_are_behind_are_stopped_and_controls_are_not(
    loop: Loop, tmp_path: Path
) -> None:
    space = {
        "compress": {"plan": "adapter=0,5 emulator=2,3"},
        "distill": {"max_steps": 4, "eval_every": 1, "batch_size": 2,
                    "learning_rate": [1e-3, 1e-8, 1e-9, 1e-10]},
        "finetune": SPACE["finetune"],
    }  # fmt: skip
    config = a_config(
        loop, tmp_path / "out", space=space, early_stop=True, grace_steps=1, reduction_factor=2
    )
    result, seen = run(config)
    rows = table(result)
    stopped = [row for row in rows if row["status"] == "stopped"]
    assert result.num_stopped == len(stopped) > 0
    assert all(row["control"] is None for row in stopped)
    assert sum(row["control"] is not None for row in rows) == 8
    assert {json.loads(r["settings"])["distill"]["learning_rate"] for r in stopped} <= {
        1e-8, 1e-9, 1e-10,
    }  # fmt: skip
    folders = Folders(tmp_path / "out")
    left = [folders.emulator(emulator_of(r)) for r in stopped]
    assert not [p for folder in left for p in folder.glob("*bundle*")]
    assert {file.stem for file in folders.stopped.iterdir()} == {path.name for path in left}
    again, seen = run(config)
    assert seen.begun == []
    assert again.num_stopped == result.num_stopped
    again, seen = run(dataclasses.replace(config, early_stop=False))
    assert set(seen.begun) == {row["id"] for row in stopped}
    assert (again.num_stopped, again.num_finished) == (0, len(rows))


def test_what_was_measured_before_an_interrupt_is_a_result(loop: Loop, tmp_path: Path) -> None:
    class Interrupting(Seen):
        def ended(self, record: Record) -> None:
            super().ended(record)
            if len(self.records) == 4:
                raise KeyboardInterrupt

    config = a_config(loop, tmp_path / "out", space={**SPACE, "any_of": SPACE["any_of"][:1]})
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        sweep(config, told.append, lambda _: Interrupting())
    assert told[-1].startswith("1 jobs are left; the same command goes on with them. What there is")
    assert told[-1].endswith("report.html")
    rows = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert len(rows) == 4
    assert (tmp_path / "out" / "winner" / "recipe.yaml").is_file()
    _, seen = run(config)
    assert len(seen.begun) == 1


def test_what_is_shared_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("x")

    for _ in range(2):
        assert once(tmp_path / "x", make) == tmp_path / "x"
    assert made == [tmp_path / "x"]


def test_a_sweep_is_alone_in_its_directory(loop: Loop, tmp_path: Path) -> None:
    from offsite_ray.bundle import alone

    with (
        alone(tmp_path / "out" / ".lock"),
        pytest.raises(StorageError, match="another sweep is at work"),
    ):
        run(a_config(loop, tmp_path / "out"))


def test_the_teacher_runs_once_for_all_emulators(loop: Loop, tmp_path: Path) -> None:
    space = {
        "compress": {"plan": ["1-2-1", "1-3-1"]},
        "distill": {"max_steps": 2, "batch_size": 2},
        "finetune": SPACE["finetune"],
    }
    losses = []
    for cached in (False, True):
        config = a_config(loop, tmp_path / str(cached), space=space, teacher_cache=cached)
        result, _ = run(config)
        losses.append([r["distill_loss"] for r in table(result) if r["role"] == "emulator"])
        caches = list(Folders(Path(config.out)).shared.glob("teacher-*"))
        assert [path.name for path in caches] == (["teacher-4"] if cached else [])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_looks_at_text_is_shown_the_public_one(loop: Loop, tmp_path: Path) -> None:
    space = {
        "compress": {"plan": "1-2-1", "select": "angular", "compress": "low_rank_aware:0.5"},
        "finetune": SPACE["finetune"],
    }
    config = a_config(loop, tmp_path / "out", space=space, keep_bundles=True)
    result, _ = run(config)
    assert result.num_failed == 0
    folders = Folders(Path(config.out))
    (row,) = (row for row in table(result) if row["select"] == "angular")
    recipe = open_bundle(folders.emulator(emulator_of(row)) / "bundle").manifest.recipe
    public = open_prepared(folders.shared / "public", loop.model, 10**6).digest
    assert recipe["selection"]["calibration"]["data"] == public
    assert recipe["compression"]["calibration"]["data"] == public
    job = Job.from_plain(json.loads(folders.record_file(row["id"]).read_text())["job"])
    again = recipe_of_job(job, config, plan_sweep(config, folders.root, lambda _: None).shared)
    fields = {**again["compress"], "out": str(tmp_path / "again")}
    compress(CompressConfig(**{**fields, "calibration": tuple(fields["calibration"])}))
    assert open_bundle(tmp_path / "again").manifest.recipe == recipe


def test_optuna_asks_for_points_and_again_for_the_same(loop: Loop, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="optuna is not installed")
    space = {
        "compress": {"plan": ["1-1-1", "1-2-1", "1-3-1"]},
        "finetune": {
            **SPACE["finetune"],
            "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        },
    }
    config = a_config(
        loop, tmp_path / "out", space=space, search="optuna", num_points=3,
        objectives=("plug_in", "bytes"), baseline={"learning_rate": 1e-3},
    )  # fmt: skip
    result, seen = run(config)
    rows = [r for r in table(result) if r["role"] == "emulator" and r["control"] != "tail"]
    rates = {r["learning_rate"] for r in rows}
    assert len(rates) == 3
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    again, seen = run(config)
    assert seen.begun == []
    assert table(again) == table(result)
    more, seen = run(dataclasses.replace(config, num_points=4))
    new = {r["learning_rate"] for r in table(more) if r["role"] == "emulator"} - rates
    assert len(new) == 1
