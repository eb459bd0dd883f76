# SPDX-License-Identifier: Apache-2.0
"""Estimates: against what training takes, what torch counts, and what is on disk."""

from __future__ import annotations

import json
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
    config = DistillConfig(model=str(loop.model), bundle=str(loop.bundle), **given)
    found = dry_run(config, seq_len=16)
    assert (found.plan, found.total_steps, found.tokens_per_step) == ("1-2-1", 7, 8 * 16)
    assert found.estimate.distillation is not None
    assert found.checkpoint_bytes == 12 * found.estimate.distillation.num_trained
    missing = DistillConfig(model=str(loop.model), bundle=str(tmp_path / "none"), **given)
    with pytest.raises(ConfigError, match="is no bundle; make it first"):
        dry_run(missing)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SHAPES)
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
