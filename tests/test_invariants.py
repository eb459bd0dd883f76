# SPDX-License-Identifier: Apache-2.0
"""Invariants 1 to 4 for every family, with stock transformers, PEFT and safetensors as judges."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from offsite_ray.architectures import load_model
from offsite_ray.errors import BundleError, ConfigError, IntegrityError, PlugInError
from tests.adapters import METHODS, make_adapter
from tests.damage import edit_tensors, reseal
from tests.stock import (
    CUT,
    KEPT,
    TOKENS,
    block_index,
    blocks_in,
    cut,
    logits_of,
    plug,
    put_blocks,
    same_bytes,
    stock,
    stored,
)
from tests.tiny_models import FAMILIES, NUM_BLOCKS, save_tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Case:
    """A family's tiny full model, loaded by stock transformers, and a bundle that drops a block."""

    family: str
    root: Path
    model: Path
    bundle: Path
    whole: Path
    """A bundle that keeps every block, with adapter blocks at both ends and inside."""
    full: PreTrainedModel
    logits: Tensor


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family = request.param
    root = tmp_path_factory.mktemp(family)
    model = save_tiny(family, root / "full")
    cut(model, CUT, root / "bundle")
    cut(model, "adapter=0,3,5 emulator=1,2,4", root / "whole")
    full = stock(model)
    return Case(family, root, model, root / "bundle", root / "whole", full, logits_of(full))


# Invariant 1: keep every block


@pytest.mark.parametrize(
    "plan", ["2-2-2", "0-4-2", "3-3-0", "adapter=0,3,5 emulator=1,2,4", "adapter=0-5 emulator="]
)
def test_keeping_every_block_keeps_every_logit(case: Case, tmp_path: Path, plan: str) -> None:
    whole = cut(case.model, plan, tmp_path / "whole")
    assert torch.equal(logits_of(load_model(whole)), case.logits)
    assert same_bytes(stored(whole), stored(case.model))


# What the emulator computes: the full model in memory, its list of blocks sliced by hand


@pytest.mark.parametrize(
    ("plan", "kept"),
    [
        (CUT, KEPT),
        ("1-2-1", (0, 1, 4, 5)),
        ("adapter=2,4 emulator=5", (2, 4, 5)),
        ("0-1-1", (2, 5)),
        ("2-0-1", (0, 1, 5)),
    ],
)
def test_an_emulator_is_the_full_model_without_the_dropped_blocks(
    case: Case, tmp_path: Path, plan: str, kept: tuple[int, ...]
) -> None:
    emulator = stock(cut(case.model, plan, tmp_path / "bundle"))
    sliced = stock(case.model)
    put_blocks(sliced, nn.ModuleList(blocks_in(sliced)[index] for index in kept))
    for name in ("layer_types", "no_rope_layers"):
        if (per_block := getattr(sliced.config, name, None)) is not None:
            setattr(sliced.config, name, [per_block[index] for index in kept])
            assert getattr(emulator.config, name) == getattr(sliced.config, name)
    sliced.config.num_hidden_layers = len(kept)
    assert emulator.config.num_hidden_layers == len(kept) == len(blocks_in(emulator))
    assert torch.equal(logits_of(emulator), logits_of(sliced))
    assert not torch.equal(logits_of(emulator), case.logits)


def test_a_bundle_holds_nothing_of_a_dropped_block(case: Case) -> None:
    full, bundle = stored(case.model), stored(case.bundle)
    expected = {name: tensor for name, tensor in full.items() if block_index(name) != 2}
    values = {tensor.numpy().tobytes() for tensor in bundle.values()}
    assert values == {tensor.numpy().tobytes() for tensor in expected.values()}
    assert {block_index(name) for name in bundle} == {None, *range(len(KEPT))}
    assert len(bundle) == len(expected) < len(full)


# Invariant 2: plug in what was not trained


def has_bias(case: Case) -> bool:
    names = [name for name in stored(case.model) if block_index(name) is not None]
    return any(name.endswith("bias") for name in names)


@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_adapter_changes_nothing(case: Case, tmp_path: Path, method: str) -> None:
    if method == "bitfit" and not has_bias(case):
        with pytest.raises(ConfigError, match="bias"):
            make_adapter(case.bundle, tmp_path / "adapter", method=method)
        return
    make_adapter(case.bundle, tmp_path / "adapter", method=method)
    plug(case.model, tmp_path / "adapter", tmp_path / "plugged")
    assert same_bytes(stored(tmp_path / "plugged"), stored(case.model))
    assert torch.equal(logits_of(load_model(tmp_path / "plugged")), case.logits)
    if method != "bottleneck":
        assert torch.equal(logits_of(stock(tmp_path / "plugged")), case.logits)


# What a plugged-in model computes


def test_a_trained_adapter_is_the_full_model_with_these_blocks(case: Case, tmp_path: Path) -> None:
    trained = make_adapter(case.bundle, tmp_path / "adapter", noise=0.05)
    result = plug(case.model, tmp_path / "adapter", tmp_path / "plugged")
    expected = stock(case.model)
    for index in (0, 3, 5):
        block = blocks_in(trained)[KEPT.index(index)]
        blocks_in(expected)[index].load_state_dict(block.state_dict())
    plugged = stock(tmp_path / "plugged")
    assert torch.equal(logits_of(plugged), logits_of(expected))
    assert not torch.equal(logits_of(plugged), case.logits)
    before, after = stored(case.model), stored(tmp_path / "plugged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(result.replaced) == {n for n in before if block_index(n) in (0, 3, 5)}


@pytest.mark.parametrize("method", METHODS)
def test_trained_by_any_method_it_computes_what_was_trained(
    case: Case, tmp_path: Path, method: str
) -> None:
    if method == "bitfit" and not has_bias(case):
        pytest.skip(f"no block of {case.family} has a bias, so bitfit has nothing to train")
    trained = make_adapter(case.whole, tmp_path / "adapter", method=method, noise=0.05)
    plug(case.model, tmp_path / "adapter", tmp_path / "plugged")
    expected, found = logits_of(trained), logits_of(load_model(tmp_path / "plugged"))
    assert (expected - case.logits).abs().max() > 1e-2
    if method == "lora":  # merged, so the sum is taken in another order
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(found, expected)


def test_stock_peft_computes_what_a_plugged_in_lora_does(case: Case, tmp_path: Path) -> None:
    make_adapter(case.bundle, tmp_path / "adapter", method="lora", noise=0.1)
    plug(case.model, tmp_path / "adapter", tmp_path / "plugged")
    plugged = logits_of(stock(tmp_path / "plugged"))
    with_peft: Any = PeftModel.from_pretrained(stock(case.model), str(tmp_path / "adapter"))
    torch.testing.assert_close(plugged, logits_of(with_peft), atol=1e-4, rtol=1e-4)
    assert (plugged - case.logits).abs().max() > 1e-2


# Invariant 3: stock transformers


def greedy(model: PreTrainedModel, *, use_cache: bool) -> list[list[int]]:
    generate: Any = model.generate
    tokens: list[list[int]] = generate(
        TOKENS,
        attention_mask=torch.ones_like(TOKENS),
        do_sample=False,
        min_new_tokens=8,
        max_new_tokens=8,
        use_cache=use_cache,
    ).tolist()
    return tokens


def check_stock_model(directory: Path, blocks: int, *, tied: bool) -> None:
    model = stock(directory)
    assert torch.equal(logits_of(model), logits_of(load_model(directory)))
    with_cache = greedy(model, use_cache=True)
    assert len(with_cache[0]) == TOKENS.shape[1] + 8
    assert with_cache == greedy(model, use_cache=False)
    assert model.config.num_hidden_layers == len(blocks_in(model)) == blocks
    for position, block in enumerate(blocks_in(model)):
        numbers = {m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")}
        assert numbers == {position}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embeddings is not None
    assert head is not None
    assert (embeddings.weight is head.weight) is tied


def test_a_bundle_is_a_stock_model(case: Case) -> None:
    tied = FAMILIES[case.family]["tie_word_embeddings"]
    check_stock_model(case.bundle, len(KEPT), tied=tied)


def test_a_plugged_in_model_is_a_stock_model(case: Case, tmp_path: Path) -> None:
    make_adapter(case.bundle, tmp_path / "adapter", noise=0.05)
    plug(case.model, tmp_path / "adapter", tmp_path / "plugged")
    tied = FAMILIES[case.family]["tie_word_embeddings"]
    check_stock_model(tmp_path / "plugged", NUM_BLOCKS, tied=tied)


# Invariant 4: what does not fit is refused, and nothing is written


@pytest.fixture
def adapter(case: Case, tmp_path: Path) -> Path:
    make_adapter(case.bundle, tmp_path / "adapter", noise=0.05)
    return tmp_path / "adapter"


def refused(
    model: Path, adapter: Path, error: type[BundleError] = PlugInError, match: str = ""
) -> None:
    parent = adapter.parent / "results"
    parent.mkdir()
    with pytest.raises(error, match=match):
        plug(model, adapter, parent / "plugged")
    assert list(parent.iterdir()) == []


def test_the_wrong_base_is_refused(case: Case, tmp_path: Path, adapter: Path) -> None:
    other = save_tiny(case.family, tmp_path / "other", seed=1)
    refused(other, adapter, match="is not the model")


def test_an_altered_dropped_block_is_another_base(
    case: Case, tmp_path: Path, adapter: Path
) -> None:
    other = save_tiny(case.family, tmp_path / "other")
    name = max(n for n in stored(other) if block_index(n) == 2)
    edit_tensors(other / "model.safetensors", lambda tensors: tensors[name].mul_(1.01))
    refused(other, adapter, match="other values")


def test_an_adapter_of_another_family_is_refused(tmp_path: Path, adapter: Path) -> None:
    family = json.loads((adapter / "offsite.json").read_text(encoding="utf-8"))["model"]["family"]
    other = "gpt2" if family == "llama" else "llama"
    refused(save_tiny(other, tmp_path / "other"), adapter, match=f"{family}.*{other}")


def test_a_model_of_another_depth_is_refused(case: Case, tmp_path: Path, adapter: Path) -> None:
    other = save_tiny(case.family, tmp_path / "other", num_hidden_layers=NUM_BLOCKS + 1)
    refused(other, adapter, match="7")


def _first(tensors: dict[str, Tensor]) -> str:
    return min(name for name, tensor in tensors.items() if tensor.ndim == 2)


def _shape(tensors: dict[str, Tensor]) -> None:
    tensors[_first(tensors)] = tensors[_first(tensors)][1:]


def _dtype(tensors: dict[str, Tensor]) -> None:
    tensors[_first(tensors)] = tensors[_first(tensors)].to(torch.bfloat16)


def _missing(tensors: dict[str, Tensor]) -> None:
    del tensors[_first(tensors)]


def _extra(tensors: dict[str, Tensor]) -> None:
    tensors[f"{_first(tensors)}s"] = torch.zeros(2)


def _middle(tensors: dict[str, Tensor]) -> None:
    tensors[_first(tensors).replace(".0.", ".2.", 1)] = tensors[_first(tensors)].clone()


def _moved(tensors: dict[str, Tensor]) -> None:
    name = _first(tensors)
    tensors[name.replace(".0.", ".1.", 1)] = tensors.pop(name)


def _value(value: float) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[_first(tensors)][-1, -1] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        pytest.param(_shape, "where the model has", id="shape"),
        pytest.param(_dtype, "BF16.*F32", id="dtype"),
        pytest.param(_missing, "lacks", id="missing"),
        pytest.param(_extra, "holds", id="extra"),
        pytest.param(_middle, "holds", id="of-the-middle"),
        pytest.param(_moved, "lacks", id="of-another-block"),
        pytest.param(_value(float("nan")), "not finite", id="nan"),
        pytest.param(_value(float("-inf")), "not finite", id="infinite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    case: Case, adapter: Path, edit: Callable[[dict[str, Tensor]], None], match: str
) -> None:
    edit_tensors(adapter / "adapter.safetensors", edit)
    reseal(adapter)
    refused(case.model, adapter, match=match)


def test_another_plan_is_refused(case: Case, adapter: Path) -> None:
    def other_blocks(manifest: dict[str, Any]) -> None:
        manifest["plan"] |= {
            "adapter": [0, 2, 5],
            "emulator": [1, 4],
            "kept": [0, 1, 2, 4, 5],
            "text": "adapter=0,2,5 emulator=1,4",
        }

    reseal(adapter, other_blocks)
    refused(case.model, adapter, match="lacks")


def test_an_altered_adapter_is_refused(case: Case, adapter: Path) -> None:
    edit_tensors(adapter / "adapter.safetensors", _value(0.0))
    refused(case.model, adapter, IntegrityError, match="altered")
