# SPDX-License-Identifier: Apache-2.0
"""The distillation benchmarks: floor, equal losses of both ways, results, the quality table."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import distill, quality
from benchmarks.cases import ROOT
from benchmarks.distill_floor import distill_flops
from benchmarks.distill_page import BEGIN, section
from benchmarks.distill_ways import WEIGHTS, Clock, Job, read_clock, task_of
from benchmarks.models import SHAPES, write_model
from benchmarks.page import END
from benchmarks.quality_cells import LOSSES, UNDISTILLED, Laboratory, Recipe
from benchmarks.quality_page import BEGIN as QUALITY_BEGIN
from benchmarks.quality_page import Mean, gain, mean, tables
from offsite_ray.training.batches import collate

if TYPE_CHECKING:
    from pathlib import Path

SEQ_LEN = 48
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its bundle."""
    root = tmp_path_factory.mktemp("bench-distill")
    write_model(SHAPES["tiny"], "fp32", f"{root}/model", f"{root}/bundle")
    return root


def job(written: Path, way: str, loss: str) -> Job:
    return Job(
        directory=str(written),
        way=way,
        loss=loss,
        seq_len=SEQ_LEN,
        batch_size=2,
        dtype="fp32",
        device="cpu",
        warmup=0,
        steps=1,
    )


def built(written: Path, tmp_path: Path, way: str, loss: str) -> tuple[Any, dict[str, Any]]:
    """Return the module that is trained, with attention that torch can count, and a batch."""
    (tmp_path / way).mkdir()
    task = task_of(job(written, way, loss), tmp_path / way)
    module = task.build(CPU)
    for part in module.modules():
        config: Any = vars(part).get("config")
        if config is not None:
            config._attn_implementation = "eager"
    train, _ = task.datasets()
    return module, collate([train[0], train[1]], CPU)


@pytest.mark.parametrize("loss", WEIGHTS)
@pytest.mark.parametrize("way", ["shared", "plain"])
def test_the_floor_is_what_torch_counts(written: Path, tmp_path: Path, way: str, loss: str) -> None:
    module, batch = built(written, tmp_path, way, loss)
    with FlopCounterMode(display=False) as counter:
        torch.stack(list(module(**batch).values())).sum().backward()  # type: ignore[no-untyped-call]
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    floor = distill_flops(SHAPES["tiny"], SEQ_LEN, 2, way=way, loss=loss)
    assert counted["aten.mm"] + counted["aten.addmm"] == floor.matrices
    # The eager attention also multiplies with keys after a query, all but (T + 1) / 2T in vain.
    assert counted["aten.bmm"] * (SEQ_LEN + 1) == floor.attention * 2 * SEQ_LEN


@pytest.mark.parametrize("loss", WEIGHTS)
def test_both_ways_have_the_same_losses_and_gradients(
    written: Path, tmp_path: Path, loss: str
) -> None:
    found = []
    for way in ("shared", "plain"):
        module, batch = built(written, tmp_path, way, loss)
        parts = module(**batch)
        torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
        grads = sorted(float(p.grad.norm()) for p in module.parameters() if p.grad is not None)
        found.append(({name: part.item() for name, part in parts.items()}, grads))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3, abs=1e-7)


def test_a_clock_gives_the_time_between_forward_passes_of_training(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    Clock(tmp_path / "0", CPU).watch(module)
    for _ in range(4):
        module(torch.ones(1, 2))
    with torch.no_grad():
        module(torch.ones(1, 2))
    measured = read_clock(tmp_path / "0", warmup=1)
    assert len(measured.step_seconds) == len(measured.step_cpu_seconds) == 2
    assert all(seconds > 0 for seconds in measured.step_seconds)
    assert measured.peak_bytes >= measured.imported_bytes > 0


@pytest.mark.long
@pytest.mark.slow
def test_a_run_writes_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One as a script; the other with one way on Ray, as the rest starts as it does."""
    bare, here, *_, on_ray = distill.LOOPS
    monkeypatch.setattr(distill, "LOOPS", (bare, here, on_ray))
    sizes = ["--shape", "tiny", "--overhead-shape", "tiny", "--device", "cpu", "--seq-len", "32"]
    effort = ["--rounds", "1", "--steps", "2", "--overhead-rounds", "1", "--overhead-steps", "3"]
    places = ["--results", str(tmp_path), "--scratch", str(tmp_path)]
    words = [*sizes, *effort, *places, "--part"]
    script = [sys.executable, "benchmarks/distill.py", *words, "ways"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    distill.main([*words, "loops"])
    result = json.loads((tmp_path / "distill-cpu.json").read_text())
    assert list(result) == ["ways", "loops"]
    (ways,) = result["ways"]["models"]
    for row in ways["rows"]:
        assert row["floor"] == row["flops"]["plain"] / row["flops"]["shared"] > 1
        assert row["throughput"] > 0
        assert len(row["shared"]["rounds"][0][0]["step_seconds"]) == 2
    (loops,) = result["loops"]["models"]
    assert [row["title"] for row in loops["rows"]] == [loop.title for loop in distill.LOOPS]
    assert set(loops["rows"][0]["over_bare"].values()) == {0.0}
    assert section(tmp_path).count("| --- |") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["distill-cpu.json"]


def test_a_gain_is_beyond_the_spread_from_two_standard_deviations_on() -> None:
    undistilled = mean([5.0, 5.25, 5.5])
    assert undistilled == Mean(value=5.25, spread=0.25, num_seeds=3)
    distilled = Mean(value=4.5, spread=0.0, num_seeds=3)
    found = gain(undistilled, distilled)
    assert (found.value, found.spread) == (0.75, 0.25)
    assert found.beyond is True
    assert gain(undistilled, replace(distilled, value=4.75)).beyond is False
    assert gain(distilled, undistilled).beyond is False
    assert gain(undistilled, replace(distilled, spread=None)).beyond is None
    assert mean([]) is None


@pytest.mark.long
@pytest.mark.slow
def test_a_quality_run_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "TEXTS", {"Shakespeare": quality.TEXTS["Shakespeare"]})
    model = ROOT / "examples" / "foundation"
    words = (ROOT / "README.md").read_text(encoding="utf-8") * 3
    file = tmp_path / "text.txt"
    file.write_text(words, encoding="utf-8")
    recipe = Recipe(
        seeds=(0, 1), dtype="fp32", seq_len=32, batch_size=2, distill_steps=4, rates=(1e-3,),
        pilot_steps=1, tune_steps=1, test_characters=500, course_seeds=(0,),
    )  # fmt: skip
    told: list[str] = []

    def laboratory(*, stored: bool = False) -> Laboratory:
        texts = dict.fromkeys(quality.TEXTS, file)
        tell = None if stored else told.append
        return Laboratory(recipe, model, texts, file, tmp_path / "work", tell)

    found = quality.measure(laboratory())
    num_cells = len(told)
    assert num_cells == len(list((tmp_path / "work" / "cells").iterdir()))
    (tmp_path / "work" / "cells" / "tune-hidden-4-Shakespeare-1.json").unlink()
    partly = quality.measure(laboratory(stored=True))
    assert len(told) == num_cells
    assert partly["tuned"]["hidden"]["Shakespeare"]["1"] is None
    again = quality.measure(laboratory())
    assert len(told) == num_cells + 1
    tuned = found["tuned"]["hidden"]["Shakespeare"]["1"]
    made_again = again["tuned"]["hidden"]["Shakespeare"]["1"]
    assert {**made_again, "seconds": 0} == {**tuned, "seconds": 0}
    assert list(found["tuned"]) == [UNDISTILLED, *LOSSES]
    emulators = {
        cell["emulator_zero_shot"] for cell in found["tuned"]["lm"]["Shakespeare"].values()
    }
    assert len(emulators) == 2


def test_without_the_real_data_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFSITE_RAY_REAL_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match=r"lacks models/fm16, .*OFFSITE_RAY_REAL_DATA"):
        quality.main(["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")])


def test_the_page_shows_the_results_in_the_repository() -> None:
    text = distill.PAGE.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == section(distill.RESULTS).strip()
    result = json.loads((quality.RESULTS / "quality.json").read_text(encoding="utf-8"))
    assert text.split(QUALITY_BEGIN)[1].split(END)[0].strip() == tables(result).strip()
