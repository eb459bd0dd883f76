# SPDX-License-Identifier: Apache-2.0
"""What a sweep refuses before anything runs, and what can then be corrected."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from offsite_ray.errors import OffsiteError, StorageError
from offsite_ray.tune import dry_run
from offsite_ray.tune.folders import Folders
from offsite_ray.tune.planned import plan_sweep
from tests.sweeps import SPACE, a_config, run

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loops import Loop


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"public": ()}, "give the text for it as public"),
        (
            {"public": (), "space": {"compress": {"plan": "1-2-1", "select": "angular"}}},
            "angular looks at what the full model does with text",
        ),
        ({"seq_len": 65}, "64 positions"),
        ({"proxy": "hiden"}, "unknown proxy 'hiden'"),
        ({"proxy": "layerwise", "early_stop": True}, "has a layerwise_weight but 0"),
        ({"space": {"compress": {"plan": "4-2-1"}}}, "needs 7 blocks"),
        (
            {
                "space": {"compress": {"plan": ["1-2-1", "1-3-1", "4-2-1"]}},
                "search": "random",
                "num_points": 1,
            },
            "needs 7 blocks",
        ),
        ({"private": ("missing.txt",)}, "missing.txt"),
        ({"text": ("missing.txt",)}, "missing.txt"),
        ({"tasks": ("arc_easie",)}, "did you mean 'arc_easy'?"),
        ({"tasks": ("arc_easy",), "task_data": ("arc_easy=missing.json",)}, "missing.json"),
        ({"search": "optuna", "num_points": 2}, "needs the package optuna"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    loop: Loop, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    if changes.get("search") == "optuna":
        import importlib.util

        if importlib.util.find_spec("optuna"):
            pytest.skip("optuna is installed, so it is not missed")
    with pytest.raises(OffsiteError) as caught:
        run(a_config(loop, tmp_path / "out", **changes))
    assert said in str(caught.value)
    assert not (tmp_path / "out" / "trials").exists()


def test_a_dry_run_counts_the_jobs_and_writes_nothing(loop: Loop, tmp_path: Path) -> None:
    config = a_config(loop, tmp_path / "out", seeds=2, dry_run=True)
    size = dry_run(config, lambda _: None)
    planned = plan_sweep(
        dataclasses.replace(config, out=str(tmp_path / "b")), tmp_path / "b", print
    )
    assert size.jobs == len(planned.jobs())
    assert size.jobs == size.full_model + size.full_fine_tuning + size.bounds + size.emulators
    # two points, of which the undistilled one is its own uniform control
    assert (size.emulators, size.controls) == (2 * (2 + 3), 2 * 4)
    assert (size.distillations, size.distill_steps) == (2 * 3, 2 * 3 * 2)
    finetune = {**SPACE["finetune"], "learning_rate": [1e-3, 3e-3]}
    shared = {**SPACE, "finetune": finetune}
    twice = dry_run(dataclasses.replace(config, space=shared), lambda _: None)
    assert twice.emulators == 2 * size.emulators
    assert (twice.distillations, twice.distill_steps) == (size.distillations, size.distill_steps)
    epochs = {"compress": {"plan": "1-2-1"}, "distill": {"epochs": 2}}
    unknown = dry_run(dataclasses.replace(config, space=epochs), lambda _: None)
    assert (unknown.distillations > 0, unknown.distill_steps) == (True, None)
    assert not (tmp_path / "out").exists()


def test_documents_of_tasks_are_found_from_any_directory(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"question": "What is 1 + 1?", "choices": ["2", "3"], "answer": 0}
    (tmp_path / "asked.json").write_text(json.dumps([row, row]))
    monkeypatch.chdir(tmp_path)
    config = a_config(
        loop, tmp_path / "out", tasks=("arc_easy",), task_data=("arc_easy=asked.json",)
    )
    planned = plan_sweep(config, tmp_path / "out", lambda _: None)
    assert planned.shared.task_data == (f"arc_easy={tmp_path / 'asked.json'}",)


def test_settings_that_nothing_came_of_can_be_corrected(loop: Loop, tmp_path: Path) -> None:
    folders = Folders(tmp_path / "out")

    def plan(**changes: Any) -> str:
        config = a_config(loop, folders.root, **changes)
        planned = plan_sweep(config, folders.root, lambda _: None)
        return str(planned.shared.facts["private_data"])

    first = plan()
    with pytest.raises(OffsiteError, match=r"missing\.txt"):
        plan(private=("missing.txt",))
    # what was shared is of the text that is named now, and not of the one before
    assert first != plan(private=(str(loop.rows),))
    job = folders.of("fine_tuned-0-seed0")
    folders.write_record(job.name, {"id": job.name, "status": "failed"})
    assert first == plan()
    assert not job.exists()
    job.mkdir(parents=True)  # at work when its sweep was killed
    with pytest.raises(StorageError, match="is a sweep with seq_len=16, not 32"):
        plan(seq_len=32)


@pytest.mark.parametrize("changed", ["text.txt", "model"])
def test_a_sweep_does_not_go_on_with_other_contents_under_the_same_name(
    loop: Loop, tmp_path: Path, changed: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(loop.text.read_bytes())
    model = tmp_path / "model"
    shutil.copytree(loop.model, model)
    out = tmp_path / "out"
    config = a_config(loop, out, model=str(model), text=(str(text),))
    plan_sweep(config, out, lambda _: None)
    (Folders(out).trials / "at-work").mkdir(parents=True)
    plan_sweep(config, out, lambda _: None)
    other_names = a_config(loop, out, model=str(loop.model), text=(str(loop.text),))
    plan_sweep(other_names, out, lambda _: None)
    plan_sweep(config, out, lambda _: None)
    if changed == "model":
        full = AutoModelForCausalLM.from_pretrained(model)
        with torch.no_grad():
            for weight in full.parameters():
                weight.add_(0.5)
        full.save_pretrained(model)
    else:
        text.write_text("These are not the words that its results were measured on. " * 40)
    with pytest.raises(StorageError, match=f"other contents of .*{changed}"):
        plan_sweep(config, out, lambda _: None)
