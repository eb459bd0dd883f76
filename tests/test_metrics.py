# SPDX-License-Identifier: Apache-2.0
"""Where the numbers of a run go: a file of lines, TensorBoard, services."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.distillation import distill
from offsite_ray.errors import ConfigError, DivergedError, StorageError
from offsite_ray.results import EvalRecord, Record, RunStart, StepRecord, to_plain
from offsite_ray.training import run_here
from offsite_ray.training.metrics import METRICS_FILE, JsonLines, logged
from tests.loops import Loop, Stopped, distill_config, ignore, stop_after
from tests.tensorboard_events import events, points

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_ray.config import DistillConfig


def config(loop: Loop, tmp_path: Path, **changes: Any) -> DistillConfig:
    given: dict[str, Any] = {
        "out": tmp_path / "out",
        "max_steps": 6,
        "eval_every": 3,
        "checkpoint_every": 2,
        "log_dir": str(tmp_path / "logs"),
        "peak_tflops": 1.0,
        **changes,
    }
    return distill_config(loop, **given)


def run(given: DistillConfig, report: Any = ignore) -> None:
    with logged(given, report) as both:
        distill(given, run_here, both)


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    text = (tmp_path / "logs" / METRICS_FILE).read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_every_step_and_evaluation_is_written(loop: Loop, tmp_path: Path) -> None:
    seen: list[Record] = []
    run(config(loop, tmp_path), seen.append)
    steps = [record for record in seen if isinstance(record, StepRecord)]
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    trained = [line for line in written if "train/loss" in line]
    assert [line["train/loss"] for line in trained] == [record.losses["loss"] for record in steps]
    expected = {"loss", "hidden", "lm", "learning_rate", "grad_norm", "tokens_per_s"}
    expected |= {"flops_utilisation", "peak_memory_bytes"}
    assert {f"train/{name}" for name in expected} == set(trained[0]) - {"step"}
    assert all(0 < line["train/flops_utilisation"] < 1 for line in trained)
    evaluated = [line for line in written if "eval/loss" in line]
    names = {"eval/loss", "eval/hidden", "eval/lm", "eval/drift/1", "eval/drift/4", "step"}
    assert all(set(line) == names for line in evaluated)
    assert evaluated[-1]["eval/drift/4"] == pytest.approx(evaluated[-1]["eval/hidden"])


def test_tensorboard_holds_the_same_numbers(loop: Loop, tmp_path: Path) -> None:
    run(config(loop, tmp_path))
    found = points(tmp_path / "logs")
    written = [line for line in lines(tmp_path) if "train/loss" in line]
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in found["train/loss"]] == pytest.approx(
        [line["train/loss"] for line in written], rel=1e-6
    )
    assert [step for step, _ in found["eval/drift/1"]] == [0, 3, 6]


def test_a_resumed_run_goes_on_in_the_same_file(loop: Loop, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(config(loop, tmp_path), stop_after(5))
    assert [line["step"] for line in lines(tmp_path)][-1] == 5
    with (tmp_path / "logs" / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "tra')  # as a killed process leaves it
    run(config(loop, tmp_path, resume=True))
    starts = [event.step for event in events(tmp_path / "logs") if event.HasField("session_log")]
    assert starts == [0, 0]  # TensorBoard drops what the file before has
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 3, 4, 5, 6, 6]


def test_a_new_run_begins_a_new_file(loop: Loop, tmp_path: Path) -> None:
    run(config(loop, tmp_path))
    run(config(loop, tmp_path, out=str(tmp_path / "again"), max_steps=1))
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 1]


def test_workers_that_are_started_again_do_not_repeat_lines(loop: Loop, tmp_path: Path) -> None:
    start = RunStart(total_steps=4, first_step=0, num_train=1, num_held_out=1)
    steps = [StepRecord(step=n, losses={"loss": float(n)}, learning_rate=0.1) for n in range(1, 5)]
    evaluated = EvalRecord(step=0, losses={"loss": 9.0})
    again = replace(start, first_step=2, earlier=(evaluated, *steps[:2]))
    assert RunStart.from_plain(to_plain(again)) == again
    # The second step was recorded, and not told before the workers were lost.
    records: list[Record] = [start, evaluated, steps[0], again, *steps[2:]]
    with logged(config(loop, tmp_path), ignore) as report:
        for record in records:
            report(record)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_log_directory_that_cannot_be_is_said_before_anything_runs(
    loop: Loop, tmp_path: Path
) -> None:
    (tmp_path / "logs").write_text("mine")
    with pytest.raises(StorageError, match="logs: File exists"):
        run(config(loop, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_full_log_disk_hides_neither_progress_nor_what_failed(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no space")

    seen: list[Record] = []
    start = RunStart(total_steps=4, first_step=0, num_train=1, num_held_out=1)
    step = StepRecord(step=1, losses={"loss": 1.0}, learning_rate=0.1)

    def fail_while_logged() -> None:
        with logged(config(loop, tmp_path), seen.append) as report:
            report(start)
            monkeypatch.setattr(JsonLines, "write", refuse)
            monkeypatch.setattr(JsonLines, "close", refuse)
            with pytest.raises(OSError, match="no space"):
                report(step)
            raise DivergedError("the reason")

    with pytest.raises(DivergedError, match="the reason"):
        fail_while_logged()
    assert seen == [start, step]


def test_nothing_is_logged_unless_asked(loop: Loop, tmp_path: Path) -> None:
    run(config(loop, tmp_path, log_dir=None))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_unknown_or_missing_service_is_said_before_anything_runs(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        run(config(loop, tmp_path, report_to=("wandp",)))
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
        with pytest.raises(ConfigError, match=f"needs the package {name}; pip install it"):
            run(config(loop, tmp_path, report_to=(name,)))
    assert list(tmp_path.iterdir()) == []
