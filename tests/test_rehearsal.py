# SPDX-License-Identifier: Apache-2.0
"""A step without memory against the same step with memory, and against counts by hand."""

from __future__ import annotations

import resource
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.cases import CASES, Case
from benchmarks.floor import step_flops
from benchmarks.models import SHAPES, write_model
from offsite_ray.architectures import (
    DTYPES,
    empty_model,
    kept_config,
    load_config,
    resolve_architecture,
)
from offsite_ray.config import DistillConfig, FinetuneConfig
from offsite_ray.distillation import distillation_module
from offsite_ray.finetuning import finetuning_module
from offsite_ray.rehearsal import Rehearsal, empty_batch, rehearse
from offsite_ray.rehearsal.ledger import Ledger
from offsite_ray.selection import uniform
from offsite_ray.split import parse_plan
from offsite_ray.training import set_dtypes
from offsite_ray.training.devices import device_type, standing_for
from tests.tiny_models import FAMILIES, NUM_BLOCKS, tiny_config

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

BATCH, TOKENS = 2, 24
_AutoModel: Any = AutoModelForCausalLM


def distilled(family: str, *, memory: bool, dtype: str = "fp32", **options: Any) -> nn.Module:
    """Return the module that distillation trains, of a tiny model with or without weights."""
    config = tiny_config(family)
    arch = resolve_architecture(config)
    plan = parse_plan("1-2-2", NUM_BLOCKS, uniform)
    make = _AutoModel.from_config if memory else empty_model
    given = DistillConfig(model="-", bundle="-", data=("-",), out="-", **options)
    module = distillation_module(
        make(config).eval(),
        make(kept_config(config, arch, plan.kept)).eval(),
        arch,
        plan,
        given,
        use_positions=True,
    )
    set_dtypes(module, DTYPES[dtype])
    return module


def performed(module: nn.Module, *, packed: bool = False, autocast: bool = False) -> Ledger:
    """Return the ledger of a step that has memory."""
    tokens = torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) % 100
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    if packed:
        batch["position_ids"] = (torch.arange(TOKENS) % (TOKENS // 2)).repeat(BATCH, 1)
    ledger = Ledger(module)
    with ledger:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            parts = module(**batch)
        loss = sum(parts.values())
        del parts
        loss.backward()
    return ledger


def rehearsed(module: nn.Module, *, packed: bool = False, **given: Any) -> Rehearsal:
    batch = empty_batch(BATCH, TOKENS, positions=packed)
    return rehearse(module, batch, **{"device": "cpu", "autocast": False, **given})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_without_memory_is_the_step_with_memory(family: str, dtype: str) -> None:
    autocast = dtype == "bf16"
    expected = performed(distilled(family, memory=True, dtype=dtype), autocast=autocast)
    found = rehearsed(distilled(family, memory=False, dtype=dtype), autocast=autocast)
    assert found.operations == expected.operations
    assert found.most.gradients == expected.most.gradients
    assert found.most.total == pytest.approx(expected.most.total, rel=0.005)
    assert found.most_others.others == pytest.approx(expected.most_others.others, rel=0.005)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"layerwise_weight": 1.0, "logits_weight": 1.0},
        {"lm_weight": 0.0},
        {"hidden_weight": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
def test_so_it_is_for_every_loss_and_with_recomputation(
    options: dict[str, Any], packed: bool
) -> None:
    expected = performed(distilled("llama", memory=True, **options), packed=packed)
    found = rehearsed(distilled("llama", memory=False, **options), packed=packed)
    assert found.operations == expected.operations
    assert found.most.total == pytest.approx(expected.most.total, rel=0.005)
    assert (found.operations.recomputed > 0) == ("gradient_checkpointing" in options)
    assert (found.operations.teacher > 0) == (options.get("hidden_weight") != 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_rehearsed_for_a_gpu(family: str) -> None:
    options = {"gradient_checkpointing": True}
    found, plain = (
        rehearsed(
            distilled(family, memory=False, dtype="bf16", **given),
            packed=True,
            device="cuda",
            autocast=True,
        )
        for given in (options, {})
    )
    assert found.weights == plain.weights
    assert found.operations.forward == plain.operations.forward
    assert found.operations.recomputed > 0 == plain.operations.recomputed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its bundle for each family whose step is counted by hand."""
    root = tmp_path_factory.mktemp("rehearsal")
    for family in ("opt", "gpt2"):
        shape = replace(SHAPES["tiny"], family=family)
        write_model(shape, "fp32", f"{root}/{family}", f"{root}/{family}-bundle")
    return root


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_operations_are_those_counted_by_hand(
    models: Path, family: Literal["opt", "gpt2"], case: Case
) -> None:
    shape = replace(SHAPES["tiny"], family=family)
    work = case.work(shape)
    config = load_config(models / (f"{family}-bundle" if case.on_bundle else family))
    arch = resolve_architecture(config)
    given = FinetuneConfig(bundle="-", data=("-",), out="-", method=case.method)
    whole = not case.on_bundle and case.method == "full"
    with torch.device("meta"):
        module = finetuning_module(
            empty_model(config).float().eval(),
            arch,
            None if whole else sorted(work.trained),
            given,
            use_positions=False,
        )
    found = rehearsed(module)
    floor = step_flops(work, TOKENS, batch_size=BATCH)
    assert found.operations.total == floor.total
    assert (found.trained, found.frozen) == (work.num_trained, work.num_frozen)


def test_a_model_of_eight_billion_weights_takes_no_memory() -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    given = FinetuneConfig(model="-", data=("-",), out="-")
    module = finetuning_module(
        empty_model(config), resolve_architecture(config), None, given, use_positions=False
    )
    found = rehearsed(module, device="cuda")
    assert found.trained == 8_030_261_248
    assert found.most.gradients > 3.7 * 8.03e9  # float32, all but those of the last blocks
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 500e6


def test_a_stand_in_says_what_it_stands_for() -> None:
    tensor = torch.zeros(1)
    assert device_type(tensor) == "cpu"
    with standing_for("cuda"):
        assert device_type(tensor) == "cuda"
    assert device_type(tensor) == "cpu"


def test_functions_are_put_back_where_a_step_fails() -> None:
    attention = torch.nn.functional.scaled_dot_product_attention
    module = distilled("gpt2", memory=False)
    module.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rehearsed(module, device="cuda")
    assert torch.nn.functional.scaled_dot_product_attention is attention


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=str)
def test_a_gpu_takes_what_was_rehearsed(family: str, options: dict[str, Any]) -> None:
    module = distilled(family, memory=True, dtype="bf16", **options).cuda()
    tokens = torch.arange(64 * 64, device="cuda").reshape(64, 64) % 100
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        parts = module(input_ids=tokens, labels=tokens)
    sum(parts.values()).backward()
    measured = torch.cuda.max_memory_allocated() - before
    found = rehearse(
        distilled(family, memory=False, dtype="bf16", **options),
        empty_batch(64, 64, positions=False),
        device="cuda",
        autocast=True,
    )
    assert found.most.total == pytest.approx(measured, rel=0.15, abs=2**23)
