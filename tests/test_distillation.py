# SPDX-License-Identifier: Apache-2.0
"""Distillation: what the slots compute, what trains, what is written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from offsite_ray.architectures import get_blocks, load_config, load_model, resolve_architecture
from offsite_ray.bundle import TensorDirectory
from offsite_ray.config import CompressConfig, DistillConfig
from offsite_ray.data import open_prepared, split_blocks, write_blocks
from offsite_ray.distillation import (
    DISTILLATION_LOSSES,
    DistillResult,
    DistillTask,
    distill,
    normalized_error,
)
from offsite_ray.emulator import compress, open_bundle
from offsite_ray.errors import ConfigError, PlugInError
from offsite_ray.training import run_here
from tests.loops import Loop, ignore
from tests.tiny_models import FAMILIES, save_tiny

if TYPE_CHECKING:
    from pathlib import Path


def config(loop: Loop, out: Path, **changes: Any) -> DistillConfig:
    given = {
        "model": str(loop.model),
        "bundle": str(loop.bundle),
        "data": (str(loop.text),),
        "out": str(out),
        "max_steps": 10,
        "batch_size": 4,
        "seq_len": 32,
        "learning_rate": 3e-3,
        "num_workers": 0,
        **changes,
    }
    return DistillConfig(**given)


def run(given: DistillConfig) -> DistillResult:
    return distill(given, run_here, ignore)


def test_the_error_is_relative_to_each_sequence() -> None:
    target = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    emulated = target * torch.tensor([1.0, 1.5, 2.0]).view(3, 1, 1)
    assert normalized_error(emulated, target).item() == pytest.approx(0.0 + 0.25 + 1.0, rel=1e-5)
    assert normalized_error(1000 * emulated, 1000 * target).item() == pytest.approx(1.25, rel=1e-5)


def reference_losses(
    model: Any, emulator: Any, blocks_of: Any, loop: Loop, batch: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Return the losses from whole stock models and hooks, with nothing of the slots."""
    plan = open_bundle(loop.bundle).plan
    last = plan.segments[0].blocks[-1]
    caught: dict[str, torch.Tensor] = {}

    def catch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            caught[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    blocks_of(model)[last].register_forward_hook(catch("teacher"))
    blocks_of(emulator)[plan.kept.index(plan.emulator[-1])].register_forward_hook(catch("student"))
    given = {"input_ids": batch["input_ids"], "use_cache": False}
    with torch.no_grad():
        model(**given)
        logits = emulator(**given).logits
    error = (caught["student"] - caught["teacher"]).square().mean((1, 2))
    hidden = (error / caught["teacher"].square().mean((1, 2))).sum()
    lm = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    return {"hidden": hidden.item(), "lm": lm.item()}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_slots_compute_what_two_whole_models_do(family: str, tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    save_tiny(family, loop.model)
    compress(CompressConfig(model=str(loop.model), plan="1-2-1", out=str(loop.bundle)))
    bundle = open_bundle(loop.bundle)
    loop.text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    write_blocks([str(loop.text)], loop.model, 16, tmp_path / "data")
    arch = resolve_architecture(load_config(loop.model))
    task = DistillTask(
        model=str(loop.model),
        bundle=str(loop.bundle),
        bundle_id="",
        plan=bundle.plan,
        blocks=None,
        config=config(loop, tmp_path / "out"),
        data=open_prepared(tmp_path / "data", loop.model, 128),
        use_positions=False,
    )
    rows, _ = split_blocks(tmp_path / "data", 0.1, 0)
    batch = {name: torch.stack([rows[i][name] for i in range(3)]) for name in rows[0]}
    module = task.build(torch.device("cpu"))
    with torch.no_grad():
        parts = {name: part.item() for name, part in module(**batch).items()}
    expected = reference_losses(
        load_model(loop.model), load_model(loop.bundle), lambda m: get_blocks(m, arch), loop, batch
    )
    assert set(parts) == set(DISTILLATION_LOSSES)
    assert parts == pytest.approx(expected, rel=1e-4)


def test_only_emulator_blocks_change(loop: Loop, tmp_path: Path) -> None:
    result = run(config(loop, tmp_path / "out"))
    assert result.last_losses["hidden"] < 0.7 * result.first_losses["hidden"]
    before, after = open_bundle(loop.bundle), open_bundle(tmp_path / "out")
    emulator = {before.plan.kept.index(index) for index in before.plan.emulator}
    changed = {
        name
        for name in before.weights.tensors
        if bytes(before.weights.data(name)) != bytes(after.weights.data(name))
    }
    expected = {n for n in before.weights.tensors if before.arch.block_of(n) in emulator}
    assert changed == expected
    recipe = after.manifest.recipe["distillation"]
    assert (recipe["losses"], recipe["seed"], len(recipe["data"])) == (["hidden", "lm"], 0, 64)
    assert str(loop.root) not in json.dumps(recipe)
    assert after.manifest.id != before.manifest.id
    assert after.manifest.full_model == before.manifest.full_model


def test_the_written_bundle_is_what_was_trained(loop: Loop, tmp_path: Path) -> None:
    first = run(config(loop, tmp_path / "a"))
    again = run(config(loop, tmp_path / "b", bundle=str(tmp_path / "a"), max_steps=1))
    assert again.first_losses["loss"] == pytest.approx(first.last_losses["loss"], rel=1e-5)


def test_several_segments_and_an_empty_one(loop: Loop, tmp_path: Path) -> None:
    plan = "adapter=0,3 emulator=2"
    compress(CompressConfig(model=str(loop.model), plan=plan, out=str(tmp_path / "b")))
    result = run(config(loop, tmp_path / "out", bundle=str(tmp_path / "b"), lm_weight=0.0))
    assert result.last_losses["hidden"] < result.first_losses["hidden"]
    # Blocks 4 and 5 have no stand-in, so their half of the error cannot fall.
    assert result.last_losses["hidden"] > 0.2 * result.first_losses["hidden"]


def test_an_emulator_that_keeps_everything_has_no_error(loop: Loop, tmp_path: Path) -> None:
    result = run(config(loop, tmp_path / "out", bundle=str(loop.keep_all), max_steps=1))
    assert result.first_losses["hidden"] == 0.0


def test_gradient_checkpointing_changes_nothing(loop: Loop, tmp_path: Path) -> None:
    plain = run(config(loop, tmp_path / "a", max_steps=3))
    again = run(config(loop, tmp_path / "b", max_steps=3, gradient_checkpointing=True))
    assert again.last_losses == pytest.approx(plain.last_losses, rel=1e-5)


def test_bf16_is_near_fp32(loop: Loop, tmp_path: Path) -> None:
    plain = run(config(loop, tmp_path / "a"))
    half = run(config(loop, tmp_path / "b", dtype="bf16"))
    assert half.last_losses["loss"] == pytest.approx(plain.last_losses["loss"], rel=0.02)


def test_nothing_to_distil_is_an_error(loop: Loop, tmp_path: Path) -> None:
    compress(CompressConfig(model=str(loop.model), plan="2-0-2", out=str(tmp_path / "b")))
    with pytest.raises(ConfigError, match="keeps no emulator block"):
        run(config(loop, tmp_path / "out", bundle=str(tmp_path / "b")))


def test_another_full_model_is_refused(loop: Loop, tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path / "other", seed=1)
    with pytest.raises(PlugInError, match="is not the model"):
        run(config(loop, tmp_path / "out", model=str(tmp_path / "other")))
    assert not (tmp_path / "out").exists()


def test_a_distilled_bundle_shares_no_dropped_block(loop: Loop) -> None:
    bundle = open_bundle(loop.bundle)
    full = TensorDirectory.of_model(loop.model)
    dropped = set(range(6)) - set(bundle.plan.kept)
    data = [bytes(bundle.weights.data(name)) for name in bundle.weights.tensors]
    for name in full.tensors:
        if bundle.arch.block_of(name) in dropped:
            assert bytes(full.data(name)) not in data
