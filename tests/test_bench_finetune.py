# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning benchmark: its floor against what torch counts, its results, its page."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import CASES, LORA_RANK, ROOT, Case
from benchmarks.finetune import PAGE, RESULTS
from benchmarks.floor import step_bytes, step_flops
from benchmarks.measure import PHASES, Job, TimedEngine, task_of
from benchmarks.models import SHAPES, Shape, write_model
from benchmarks.page import BEGIN, END, section, tables, update
from offsite_ray.training.loop import train_step
from offsite_ray.training.schedule import schedule

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SEQ_LEN = 48
FAMILIES: tuple[Literal["opt", "gpt2"], ...] = ("opt", "gpt2")


def tiny(family: Literal["opt", "gpt2"]) -> Shape:
    return replace(SHAPES["tiny"], name=family, family=family)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its bundle for each family."""
    root = tmp_path_factory.mktemp("bench")
    for family in FAMILIES:
        write_model(tiny(family), "fp32", f"{root}/{family}", f"{root}/{family}-bundle")
    return root


def engine_of(models: Path, family: str, case: Case) -> tuple[TimedEngine, Any]:
    job = Job(
        directory=f"{models}/{family}{'-bundle' if case.on_bundle else ''}",
        is_bundle=case.on_bundle,
        method=case.method,
        rank=LORA_RANK,
        seq_len=SEQ_LEN,
        batch_size=2,
        dtype="fp32",
        device="cpu",
        warmup=0,
        steps=1,
    )
    task = task_of(job)
    return TimedEngine(task, task.config), task


def one_step(engine: TimedEngine, task: Any) -> None:
    train, _ = task.datasets()
    train_step(task, engine, task.config, schedule(task.config, len(train)), train, 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_floor_is_what_torch_counts(
    models: Path, family: Literal["opt", "gpt2"], case: Case
) -> None:
    engine, task = engine_of(models, family, case)
    work = case.work(tiny(family))
    assert engine.num_trained == work.num_trained
    assert engine.num_parameters == work.num_trained + work.num_frozen
    # torch has no count for the attention kernel of a CPU; the eager one is two products.
    model: Any = engine._module.language_model
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        one_step(engine, task)
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    floor = step_flops(work, SEQ_LEN, batch_size=2)
    assert counted["aten.mm"] + counted["aten.addmm"] == floor.total - floor.attention
    # The eager one also multiplies with keys after a query, all but (T + 1) / 2T in vain.
    assert counted["aten.bmm"] * (SEQ_LEN + 1) == floor.attention * 2 * SEQ_LEN


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_holds_the_bytes_of_the_floor(
    models: Path, family: Literal["opt", "gpt2"], case: Case
) -> None:
    engine, task = engine_of(models, family, case)
    floor = step_bytes(case.work(tiny(family)), SEQ_LEN, batch_size=2)
    parameters = {p.untyped_storage().data_ptr() for p in engine._module.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        one_step(engine, task)
    held = sum(p.numel() * p.element_size() for p in engine._module.parameters())
    assert held == floor.weights
    state = engine._optimizer.state_dict()["state"].values()
    moments = [s[name] for s in state for name in ("exp_avg", "exp_avg_sq")]
    assert sum(m.numel() * m.element_size() for m in moments) == floor.moments
    assert sum(saved.values()) >= floor.saved
    if family == "opt":  # GPT-2's activation function is several operations, and keeps their inputs
        assert sum(saved.values()) <= 1.06 * floor.saved


@pytest.mark.long
@pytest.mark.slow
def test_a_run_writes_its_result(tmp_path: Path) -> None:
    sizes = ["--shape", "tiny", "--dtype", "fp32", "--device", "cpu", "--seq-len", "32"]
    effort = ["--rounds", "1", "--warmup", "1", "--steps", "2"]
    places = ["--results", str(tmp_path), "--scratch", str(tmp_path)]
    script = [sys.executable, "benchmarks/finetune.py", *sizes, *effort, *places]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "finetune-cpu.json").read_text())
    assert tables(result).strip() in done.stdout
    assert result["effort"]["steps"] == 2
    assert {"cpu", "num_cores", "memory_bytes", "gpu"} <= result["machine"].keys()
    assert {"python", "torch", "transformers", "peft"} <= result["versions"].keys()
    (comparison,) = result["comparisons"]
    assert [row["case"] for row in comparison["rows"]] == [case.name for case in CASES]
    for case, row, ratios in zip(CASES, comparison["rows"], comparison["ratios"], strict=True):
        check_row(case, row)
        assert all(value > 0 for value in ratios.values())
    assert set(comparison["ratios"][0].values()) == {1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["finetune-cpu.json"]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update(page, tmp_path)
    assert page.read_text() == f"before\n{BEGIN}\n\n{section(tmp_path)}\n{END}\nafter\n"


def check_row(case: Case, row: dict[str, Any]) -> None:
    work = case.work(SHAPES["tiny"])
    assert row["flops_total"] == step_flops(work, 32).total == sum(row["flops"].values())
    assert row["bytes_total"] == step_bytes(work, 32).total
    assert row["num_trained"] == work.num_trained
    (measured,) = row["rounds"]
    assert len(measured["step_seconds"]) == 2
    assert len(measured["losses"]) == 3
    assert list(measured["phase_seconds"]) == list(row["phase_seconds"]) == list(PHASES)
    assert row["memory_bytes"] == measured["peak_bytes"] - measured["imported_bytes"]


def test_the_page_shows_the_results_in_the_repository() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == section(RESULTS).strip()


def test_the_page_is_right_about_the_floor() -> None:
    """Numbers in its text, where offsite-tuning is compared with full fine-tuning."""
    shape = SHAPES["opt-24x1024"]
    full, _, offsite, lora = (case.work(shape) for case in CASES)
    text = PAGE.read_text(encoding="utf-8")
    assert f"at least {step_bytes(full, 512).total / 1e9:.1f} GB" in text
    assert f"least {step_bytes(offsite, 512).total / 1e9:.1f} GB" in text
    fp32, bf16 = (
        [
            step_bytes(full, 512, itemsize=size).total / step_bytes(row, 512, itemsize=size).total
            for row in (offsite, lora)
        ]
        for size in (4, 2)
    )
    assert f"more than {fp32[0]:.1f} times less" in text
    assert f"stored in bf16 ({bf16[0]:.1f})" in text
    assert f"({fp32[1]:.1f} in fp32, {bf16[1]:.1f} in bf16)" in text
    xl, _, _, xl_lora = (step_flops(case.work(SHAPES["gpt2-xl"]), 512).total for case in CASES)
    assert f"at equal batches allows {xl / xl_lora:.1f} times" in text
