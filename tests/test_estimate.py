# SPDX-License-Identifier: Apache-2.0
"""Estimates: against what training takes, what torch counts, and what is on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.estimate import CASES, make_models, predicted, setting_of
from benchmarks.peaks import peak_bytes
from offsite_ray.architectures import load_model, resolve_architecture
from offsite_ray.bundle import TensorDirectory
from offsite_ray.cli import main
from offsite_ray.config import DistillConfig, EstimateConfig
from offsite_ray.data import write_blocks
from offsite_ray.distillation import distillation_module
from offsite_ray.errors import ConfigError
from offsite_ray.estimate import dry_run, estimate
from offsite_ray.rehearsal import empty_batch, rehearse
from offsite_ray.split import SplitPlan
from tests.test_recipes import RECIPES, SHAPES, job, words_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loops import Loop


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt-distill", "gpt2-finetune-lora"])
def test_the_peak_is_within_15_percent_of_what_is_measured(name: str, tmp_path: Path) -> None:
    directory = make_models(CASES[name], tmp_path)
    measured = peak_bytes(setting_of(CASES[name], directory))
    assert predicted(CASES[name], directory).total == pytest.approx(measured, rel=0.15)


def test_operations_are_those_that_torch_counts(loop: Loop) -> None:
    def module() -> Any:
        config = DistillConfig(model="m", bundle="b", data=("d",), out="o")
        models = (load_model(loop.model), load_model(loop.bundle))
        arch = resolve_architecture(models[1].config)
        plan = SplitPlan(num_blocks=6, adapter=(0, 5), emulator=(1, 4))
        return distillation_module(*models, arch, plan, config, use_positions=False)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tokens = torch.arange(32)[None]
        parts = module()(input_ids=tokens, labels=tokens)
        torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
    batch = empty_batch(1, 32, positions=False)
    found = rehearse(module().to("meta"), batch, device="cpu", autocast=False).operations
    counted = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    # The two products also pair a token with those after it, all but (T + 1) / 2T in vain.
    attention = counted.pop("aten.bmm") * (32 + 1) // (2 * 32)
    assert found.total == sum(counted.values()) + attention
    assert found.recomputed == 0


def test_bytes_on_disk(loop: Loop) -> None:
    found = estimate(EstimateConfig(model=str(loop.model), plan="1-2-1", seq_len=32, dtype="fp32"))
    full, bundle = (
        sum(info.nbytes for info in TensorDirectory.of_model(path).tensors.values())
        for path in (loop.model, loop.bundle)
    )
    assert found.artefact_bytes.full_model == full
    assert found.artefact_bytes.emulator_bundle == bundle


def test_the_verb_prints_one_json_object(loop: Loop, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", "--model", str(loop.model), "--plan", "1-2-1", "--seq-len", "32"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["distillation"]["fits"] is True
    assert found["smallest_gpu_count"] == 1
    assert main(words) == 0
    assert "Memory of one GPU" in capfd.readouterr().out


def test_a_dry_run_of_distill_reads_no_weight(loop: Loop, tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": ("nowhere",), "out": str(tmp_path / "out"), "max_steps": 7}
    model = tmp_path / "model"
    weightless = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(loop.model, model, ignore=weightless)
    config = DistillConfig(model=str(model), bundle=str(loop.bundle), **given)
    found = dry_run(replace(config, seq_len=16))
    assert (found.plan, found.total_steps, found.tokens_per_step) == ("1-2-1", 7, 8 * 16)
    usual = dry_run(config)
    assert usual.tokens_per_step == 8 * 64, "as many as the model has positions"
    with pytest.raises(ConfigError, match="is more than the model's 64 positions"):
        dry_run(replace(config, seq_len=65))
    assert found.estimate.distillation is not None
    assert found.checkpoint_bytes == 12 * found.estimate.distillation.num_trained
    missing = DistillConfig(model=str(loop.model), bundle=str(tmp_path / "none"), **given)
    with pytest.raises(ConfigError, match="is no bundle; make it first"):
        dry_run(missing)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_dry_run_takes_the_rows_of_prepared_data(loop: Loop, tmp_path: Path) -> None:
    write_blocks([str(loop.text)], loop.model, 48, tmp_path / "data")
    given: dict[str, Any] = {"data": (str(tmp_path / "data"),), "out": "out"}
    config = DistillConfig(model=str(loop.model), bundle=str(loop.bundle), **given)
    assert dry_run(config).tokens_per_step == 8 * 48
    with pytest.raises(ConfigError, match="has blocks of 48 tokens, not seq_len=32"):
        dry_run(replace(config, seq_len=32))


def test_what_is_recomputed_takes_no_share_of_the_peak(loop: Loop) -> None:
    config = EstimateConfig(model=str(loop.model), plan="1-2-1", seq_len=32)
    plain, again = (estimate(replace(config, gradient_checkpointing=g)) for g in (False, True))
    for cost in (plain.distillation, again.distillation):
        assert cost is not None
        useful = cost.operations.useful / (8 * 32)
        assert cost.tokens_per_s == pytest.approx(312e12 * 0.4 / useful)
    assert again.distillation is not None
    assert again.distillation.operations.recomputed > 0
    fp32 = estimate(replace(config, dtype="fp32"))
    assert fp32.distillation is not None
    assert fp32.distillation.tokens_per_s is None, "whose peak?"


def test_a_pass_is_never_of_more_than_a_worker_has(loop: Loop) -> None:
    config = EstimateConfig(model=str(loop.model), plan="1-2-1", seq_len=32, gpus=2, batch_size=8)
    share = estimate(config).distillation
    larger = estimate(replace(config, micro_batch_size=16)).distillation
    assert share is not None
    assert larger is not None
    assert (larger.memory, larger.flops_per_step) == (share.memory, share.flops_per_step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=[] if name in ("gpt2-xl", "qwen3-8b") else pytest.mark.long)
        for name in SHAPES
    ],
)
def test_a_dry_run_of_a_recipe_fits_its_gpus(recipe: str, tmp_path: Path) -> None:
    config, num_parameters = SHAPES[recipe]
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path / "model")
    changes = [f"{verb}.model={tmp_path / 'model'}" for verb in ("compress", "distill")]
    file = str(RECIPES / f"{recipe}.yaml")
    done = job("--root", str(tmp_path), "--config", file, "--dry-run", *changes)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    asked = words_of("estimate", recipe)
    assert found["plan"] == asked.plan
    assert found["num_workers"] == asked.gpus
    assert found["estimate"]["model"]["num_parameters"] == pytest.approx(num_parameters, rel=1e-3)
    total = found["estimate"]["distillation"]["memory"]["total"]
    print(f"{recipe}: {total / 2**30:.1f} GiB on each of {asked.gpus} GPUs")
    assert total < 0.9 * asked.gpu_memory_gib * 2**30
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
