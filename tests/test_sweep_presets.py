# SPDX-License-Identifier: Apache-2.0
"""The paper's ablations, run to their end on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.errors import ConfigError
from offsite_ray.finetuning import FINETUNING_METHODS
from offsite_ray.tune import sweep
from offsite_ray.tune.attempts import Silent
from offsite_ray.tune.planned import plan_sweep
from tests.loops import make_loop
from tests.questions import own_task
from tests.sweeps import a_config, run, table

if TYPE_CHECKING:
    from offsite_ray.config.sweeping import Preset
    from tests.loops import Loop


def test_a_preset_runs_with_tasks_for_its_score(loop: Loop, tmp_path: Path) -> None:
    config = a_config(
        loop, tmp_path / "out", preset="table5", text=(), tasks=("sums",),
        task_path=(str(own_task(tmp_path)),), task_limit=4,
        space={"distill": {"max_steps": 1, "batch_size": 2},
               "finetune": {"max_steps": 2, "batch_size": 2}},
    )  # fmt: skip
    result, _ = run(config)
    rows = table(result)
    assert result.num_failed == 0
    own = [row for row in rows if row["role"] == "emulator" and row["control"] != "tail"]
    assert {row["method"] for row in own} == set(FINETUNING_METHODS)
    for row in own:
        assert (row["plug_in_nats"], row["gap_metric"]) == (None, "task_score")
        assert 0 <= row["plug_in_score"] <= 1
        gap = row["plug_in_score"] - row["emulator_fine_tuned_score"]
        assert row["privacy_gap"] == pytest.approx(gap)
    assert result.winner is not None


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """Return a tiny llama, which has no biases, with its texts; only read."""
    return make_loop(tmp_path_factory.mktemp("llama"), "llama")


def test_a_preset_leaves_out_a_method_that_has_nothing_to_train(
    llama: Loop, tmp_path: Path
) -> None:
    small = {"max_steps": 1, "batch_size": 2}
    config = a_config(
        llama, tmp_path / "out", preset="table5", space={"distill": small, "finetune": small}
    )
    told: list[str] = []
    result = sweep(config, told.append, lambda _: Silent())
    (said,) = (text for text in told if "bitfit" in text)
    assert said.startswith("table5 leaves out finetune.method=bitfit: no block of this llama has")
    rows = table(result)
    assert (result.num_failed, result.num_finished) == (0, len(rows))
    methods = {row["method"] for row in rows if row["role"] == "emulator"}
    assert methods == set(FINETUNING_METHODS) - {"bitfit"}


def test_what_the_space_says_wins_over_what_a_preset_leaves_out(
    llama: Loop, tmp_path: Path
) -> None:
    told: list[str] = []
    space = {"finetune": {"method": "lora"}}
    config = a_config(llama, tmp_path / "out", preset="table5", space=space)
    points = plan_sweep(config, tmp_path / "out", told.append).points()
    assert {point["finetune.method"] for point in points} == {"lora"}
    assert not [text for text in told if "bitfit" in text]


@pytest.mark.parametrize(
    "changes",
    [
        {"space": {"compress": {"plan": "1-2-1"}, "finetune": {"method": ["full", "bitfit"]}}},
        {"preset": "table5", "space": {"finetune": {"method": "bitfit"}}},
        {"space": {"compress": {"plan": "1-2-1"}}, "baseline": {"method": "bitfit"}},
    ],
)
def test_a_method_that_has_nothing_to_train_is_refused_before_anything_runs(
    llama: Loop, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="method=bitfit cannot be swept: no block of this llama"):
        run(a_config(llama, tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "trials").exists()


@pytest.mark.parametrize("name", ["figure3", "figure4", "table4"])
def test_a_preset_runs_to_its_page(loop: Loop, tmp_path: Path, name: Preset) -> None:
    small = {"max_steps": 1, "batch_size": 2}
    given = {"finetune": small} | ({"distill": small} if name == "table4" else {})
    config = a_config(loop, tmp_path / "out", preset=name, space=given)
    result, seen = run(config)
    assert result.num_failed == 0
    own = [row for row in table(result) if row["role"] == "emulator"]
    points = plan_sweep(config, tmp_path / "out", lambda _: None).points()
    assert {row["plan"] for row in own} >= {str(point["compress.plan"]) for point in points}
    for row in own:
        if row["id"] not in seen.begun:
            assert row["num_adapter_blocks"] + row["num_emulator_blocks"] == row["num_blocks"]
            assert (row["bound_gap"], row["privacy_gap"], row["compress"]) == (0, 0, "none")
            assert (row["plug_in_nats"], row["seconds"]) == (row["bound_nats"], None)
            assert row["emulator_zero_shot_nats"] == row["full_zero_shot_nats"]
    num_run = sum(row["id"] in seen.begun for row in own)
    assert len(own) - num_run == {"figure3": len(own), "figure4": 1, "table4": 0}[name]
    assert (result.winner is None) is (name == "figure3")
    assert len(own) >= 3
    assert all(row["privacy_gap"] is not None for row in own if row["bound_nats"] is not None)
    assert Path(result.report).stat().st_size > 10_000
