# SPDX-License-Identifier: Apache-2.0
"""Distillation: what the slots compute, what trains, what is written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from offsite_ray.architectures import get_blocks, load_config, load_model, resolve_architecture
from offsite_ray.bundle import TensorDirectory
from offsite_ray.config import CompressConfig, DistillConfig
from offsite_ray.data import open_prepared, write_blocks
from offsite_ray.distillation import (
    DISTILLATION_LOSSES,
    DistillResult,
    DistillTask,
    distill,
    last_stood_for,
    normalized_error,
)
from offsite_ray.distillation.losses import forward_divergence
from offsite_ray.emulator import compress, open_bundle
from offsite_ray.errors import ConfigError, PlugInError
from offsite_ray.split import SplitPlan
from offsite_ray.training import TorchEngine, head, run_here
from tests.loops import Loop, ignore
from tests.tiny_models import FAMILIES, save_tiny

if TYPE_CHECKING:
    from collections.abc import Callable
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


EVERY_LOSS = {
    "hidden_weight": 30.0,
    "layerwise_weight": 2.0,
    "logits_weight": 3.0,
    "lm_weight": 1.0,
    "temperature": 2.0,
}


def hidden_behind_blocks(model: Any, batch: dict[str, torch.Tensor]) -> tuple[list[Any], Any]:
    """Return the output of every block of a stock model, and its logits."""
    caught: list[torch.Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    arch = resolve_architecture(model.config)
    handles = [block.register_forward_hook(hook) for block in get_blocks(model, arch)]
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    for handle in handles:
        handle.remove()
    return caught, logits


def reference_losses(
    model: Any, emulator: Any, plan: SplitPlan, batch: dict[str, torch.Tensor], temperature: float
) -> dict[str, torch.Tensor]:
    """Return the losses from whole stock models and hooks, with nothing of the slots."""
    with torch.no_grad():
        teacher, teacher_logits = hidden_behind_blocks(model, batch)
    student, logits = hidden_behind_blocks(emulator, batch)

    def error(kept: int, end: int) -> Any:
        difference = (student[plan.kept.index(kept)] - teacher[end]).square().mean((1, 2))
        return (difference / teacher[end].square().mean((1, 2))).sum()

    # 1-2-1 of six blocks keeps 1 and 4: 1 stands for 1 to 3, 4 for itself.
    assert plan.emulator == (1, 4)
    wanted = logits[:, :-1].flatten(0, 1)
    p = (teacher_logits[:, :-1].flatten(0, 1) / temperature).softmax(-1)
    log_q = (wanted / temperature).log_softmax(-1)
    return {
        "hidden": error(4, 4),
        "layerwise": (error(1, 3) + error(4, 4)) / 2,
        "logits": temperature**2 * (p * (p.log() - log_q)).sum(),
        "lm": nn.functional.cross_entropy(
            wanted, batch["labels"][:, 1:].flatten(), reduction="sum"
        ),
        "drift/1": error(1, 3).detach(),
        "drift/4": error(4, 4).detach(),
    }


def distill_task(loop: Loop, tmp_path: Path, **changes: Any) -> DistillTask:
    write_blocks([str(loop.text)], loop.model, 16, tmp_path / "data")
    return DistillTask(
        model=str(loop.model),
        bundle=str(loop.bundle),
        bundle_id="",
        plan=open_bundle(loop.bundle).plan,
        blocks=None,
        config=config(loop, tmp_path / "out", **changes),
        data=open_prepared(tmp_path / "data", loop.model, 128),
        use_positions=False,
    )


def first_rows(task: DistillTask, count: int) -> dict[str, torch.Tensor]:
    rows, _ = task.datasets()
    return {name: torch.stack([rows[i][name] for i in range(count)]) for name in rows[0]}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_slots_compute_what_two_whole_models_do(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_CPU_PIECE", 128 * 10)  # five and more pieces of the tokens
    loop = Loop(tmp_path)
    save_tiny(family, loop.model)
    compress(CompressConfig(model=str(loop.model), plan="1-2-1", out=str(loop.bundle)))
    loop.text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    task = distill_task(loop, tmp_path, **EVERY_LOSS)
    batch = first_rows(task, 3)
    module = task.build(torch.device("cpu"))
    with torch.no_grad():
        measured = {name: part.item() for name, part in module(**batch).items()}
    emulator = load_model(loop.bundle, dtype=torch.float32)
    full = load_model(loop.model, dtype=torch.float32)
    expected = reference_losses(full, emulator, task.plan, batch, EVERY_LOSS["temperature"])
    assert set(measured) == set(DISTILLATION_LOSSES) | {"drift/1", "drift/4"}
    assert measured == pytest.approx({n: p.item() for n, p in expected.items()}, rel=1e-4)

    parts = module(**batch)
    assert set(parts) == set(DISTILLATION_LOSSES)
    for measured_or_expected in (parts, expected):
        each = [weight * measured_or_expected[name] for name, weight in task.loss_weights.items()]
        torch.stack(each).sum().backward()  # type: ignore[no-untyped-call]
    emulator_blocks = get_blocks(emulator, resolve_architecture(load_config(loop.bundle)))
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    compared = 0
    for index in task.plan.emulator:
        for name, parameter in emulator_blocks[task.plan.kept.index(index)].named_parameters():
            if parameter.grad is not None:
                (mine,) = (g for n, g in grads.items() if n.endswith(f".{index}.emulator.{name}"))
                scale = parameter.grad.abs().max()
                assert float((mine - parameter.grad).abs().max()) <= 1e-4 * float(scale) + 1e-6
                compared += 1
    assert compared == len(grads)


@pytest.mark.parametrize(
    ("weights", "teacher", "top_blocks", "head_calls"),
    [
        ({"hidden_weight": 1.0}, {1, 2, 3, 4}, 0, 0),
        ({"layerwise_weight": 1.0}, {1, 2, 3, 4}, 0, 0),
        ({"lm_weight": 1.0}, set(), 1, 1),
        ({"logits_weight": 1.0}, {1, 2, 3, 4}, 2, 2),
        ({"hidden_weight": 1.0, "lm_weight": 1.0}, {1, 2, 3, 4}, 1, 1),
    ],
)
def test_only_what_a_loss_needs_is_run(
    loop: Loop,
    tmp_path: Path,
    weights: dict[str, float],
    teacher: set[int],
    top_blocks: int,
    head_calls: int,
) -> None:
    none = dict.fromkeys(("hidden_weight", "layerwise_weight", "logits_weight", "lm_weight"), 0.0)
    task = distill_task(loop, tmp_path, **{**none, **weights})
    module: Any = task.build(torch.device("cpu"))
    ran: list[str] = []
    for name, part in module.named_modules():
        if name.endswith((".teacher", ".emulator", ".block", ".h.0", "lm_head")):
            part.register_forward_pre_hook(
                lambda _module, _inputs, name=name: ran.append(name.removeprefix("language_model."))
            )
    module(**first_rows(task, 2))
    blocks = [name for name in ran if name != "lm_head"]
    assert {int(n.split(".")[2]) for n in blocks if n.endswith(".teacher")} == teacher
    assert sum(name.endswith(".emulator") for name in blocks) == 2
    assert blocks.count("transformer.h.0") == 1  # shared by both
    assert sum(name.endswith(".block") for name in blocks) == top_blocks
    assert ran.count("lm_head") == head_calls


def test_no_teacher_in_memory_where_no_loss_needs_it(loop: Loop, tmp_path: Path) -> None:
    with_teacher = distill_task(loop, tmp_path / "a").build(torch.device("cpu"))
    alone = distill_task(loop, tmp_path / "b", hidden_weight=0.0).build(torch.device("cpu"))
    names = {name for name, _ in alone.named_parameters()}
    assert not any(".teacher." in name for name in names)
    assert len(names) < len(dict(with_teacher.named_parameters()))


def test_distilling_without_a_teacher_writes_the_right_blocks(loop: Loop, tmp_path: Path) -> None:
    result = run(config(loop, tmp_path / "out", hidden_weight=0.0))
    assert set(result.last_losses) == {"lm", "loss"}
    assert result.last_losses["lm"] < result.first_losses["lm"]
    again = run(
        config(loop, tmp_path / "b", bundle=str(tmp_path / "out"), hidden_weight=0.0, max_steps=1)
    )
    assert again.first_losses == pytest.approx(result.last_losses, rel=1e-5)


def test_what_each_emulator_block_stands_for() -> None:
    plan = SplitPlan(num_blocks=12, adapter=(0, 6, 11), emulator=(2, 4, 8))
    assert last_stood_for(plan) == {2: 3, 4: 5, 8: 10}


def test_the_divergence_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(6, 9, generator=generator) for _ in range(2))
    targets = torch.tensor([1, -100, 3, 4, -100, 0])
    wanted = targets != -100
    for temperature in (1.0, 3.0):
        p = torch.distributions.Categorical(logits=teacher[wanted] / temperature)
        q = torch.distributions.Categorical(logits=logits[wanted] / temperature)
        expected = temperature**2 * torch.distributions.kl_divergence(p, q).sum()
        found = forward_divergence(logits, teacher, targets, temperature)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_torch_compile_changes_nothing_but_rounding(loop: Loop, tmp_path: Path) -> None:
    plain = run(config(loop, tmp_path / "a", max_steps=2))
    counters["stats"].clear()
    compiled = run(config(loop, tmp_path / "b", max_steps=2, compile=True))
    assert counters["stats"]["unique_graphs"] > 0
    assert compiled.last_losses == pytest.approx(plain.last_losses, rel=1e-4)


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


def one_step(
    loop: Loop, tmp_path: Path, ending: str, look: Callable[[Any, Any], None], **changes: Any
) -> None:
    """Do a forward and a backward pass; ``look`` sees what goes in and out of some modules."""
    task = distill_task(loop, tmp_path, **changes)
    engine = TorchEngine(task, task.config)
    for name, module in engine._module.named_modules():
        if name.endswith(ending):
            module.register_forward_hook(
                lambda _module, inputs, output: look(
                    inputs[0], output[0] if isinstance(output, tuple) else output
                )
            )
    parts = engine.forward(first_rows(task, 2))
    engine.backward(torch.stack(list(parts.values())).sum())


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradient_checkpointing_recomputes_what_trains_and_no_more(
    loop: Loop, tmp_path: Path, recomputed: bool
) -> None:
    given = {"gradient_checkpointing": recomputed}
    emulators: list[Any] = []
    one_step(loop, tmp_path / "a", ".emulator.mlp.c_fc", lambda *_: emulators.append(1), **given)
    assert len(emulators) == (4 if recomputed else 2)
    # Below the first emulator block nothing trains, so nothing is differentiated.
    bottom: list[bool] = []
    one_step(loop, tmp_path / "b", ".h.0", lambda *io: bottom.append(io[0].requires_grad), **given)
    assert bottom == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_arithmetic_in_a_block_is_what_was_asked_for(
    loop: Loop, tmp_path: Path, dtype: torch.dtype
) -> None:
    seen: set[torch.dtype] = set()
    given = {"dtype": "bf16" if dtype is torch.bfloat16 else "fp32"}
    one_step(loop, tmp_path, ".mlp.c_fc", lambda *io: seen.add(io[1].dtype), **given)
    assert seen == {dtype}


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
