# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as they come: half precision, several files, names without the base's prefix."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from offsite_ray.architectures import load_model
from tests.adapters import make_adapter
from tests.damage import edit_json
from tests.stock import CUT, KEPT, blocks_in, cut, logits_of, plug, same_bytes, stock, stored
from tests.tiny_models import FAMILIES, NUM_BLOCKS, save_tiny

if TYPE_CHECKING:
    from pathlib import Path


def rename_on_disk(directory: Path, old: str, new: str) -> None:
    file = directory / "model.safetensors"
    tensors = {re.sub(old, new, name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def check_round_trip(model: Path, tmp_path: Path) -> None:
    """Keep all, cut, plug in untrained and trained: as with a plain checkpoint."""
    full = stock(model)
    whole = cut(model, "2-2-2", tmp_path / "whole")
    assert torch.equal(logits_of(stock(whole)), logits_of(full))
    bundle = cut(model, CUT, tmp_path / "bundle")
    sliced = stock(bundle)
    for position, index in enumerate(KEPT):
        ours, theirs = (
            b.state_dict() for b in (blocks_in(sliced)[position], blocks_in(full)[index])
        )
        assert same_bytes(dict(ours), dict(theirs))
    for method in ("full", "lora"):
        make_adapter(bundle, tmp_path / f"adapter-{method}", method=method)
        plug(model, tmp_path / f"adapter-{method}", tmp_path / f"plugged-{method}")
        assert same_bytes(stored(tmp_path / f"plugged-{method}"), stored(model))
        assert torch.equal(logits_of(stock(tmp_path / f"plugged-{method}")), logits_of(full))
    trained = make_adapter(bundle, tmp_path / "trained", noise=0.05)
    plug(model, tmp_path / "trained", tmp_path / "plugged-trained")
    for index in (0, 3, 5):
        block = blocks_in(trained)[KEPT.index(index)]
        blocks_in(full)[index].load_state_dict(block.state_dict())
    assert torch.equal(logits_of(stock(tmp_path / "plugged-trained")), logits_of(full))


def test_a_lora_rounds_nothing_in_a_checkpoint_of_two_dtypes(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "full", dtype=torch.bfloat16, max_shard_size=1)
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        precise = {name: t.float() * 1.0001 for name, t in tensors.items() if "norm" in name}
        save_file(tensors | precise, file, metadata={"format": "pt"})
    bundle = cut(model, CUT, tmp_path / "bundle")
    make_adapter(bundle, tmp_path / "adapter", method="lora", noise=0.1)
    replaced = plug(model, tmp_path / "adapter", tmp_path / "plugged").replaced
    assert replaced
    assert not [name for name in replaced if "norm" in name]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_half_precision_in_several_files(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "full", dtype=torch.bfloat16, max_shard_size=20_000)
    assert len(list(model.glob("*.safetensors"))) > 2
    assert (model / "model.safetensors.index.json").is_file()
    check_round_trip(model, tmp_path)


@pytest.mark.parametrize(
    ("family", "prefix", "example"),
    [
        ("gpt2", r"^transformer\.", "h.0.ln_1.weight"),
        ("bloom", r"^transformer\.", "h.0.input_layernorm.weight"),
        ("opt", r"^model\.", "decoder.layers.0.fc1.weight"),
        ("falcon", r"^transformer\.", "h.0.mlp.dense_h_to_4h.weight"),
        ("qwen2", r"^model\.", "layers.0.mlp.up_proj.weight"),
    ],
)
def test_names_without_the_prefix_of_the_base_model(
    family: str, prefix: str, example: str, tmp_path: Path
) -> None:
    model = save_tiny(family, tmp_path / "full")
    before = logits_of(stock(model))
    rename_on_disk(model, prefix, "")
    assert example in stored(model)
    assert torch.equal(logits_of(stock(model)), before)
    check_round_trip(model, tmp_path)


def test_a_config_may_hold_infinity(tmp_path: Path) -> None:
    model = save_tiny("gpt2", tmp_path / "full")
    edit_json(model / "config.json", lambda values: values.update(attention_limit=float("inf")))
    assert "Infinity" in (model / "config.json").read_text()
    bundle = cut(model, CUT, tmp_path / "bundle")
    make_adapter(bundle, tmp_path / "adapter")
    plug(model, tmp_path / "adapter", tmp_path / "plugged")
    assert same_bytes(stored(tmp_path / "plugged"), stored(model))


@pytest.mark.parametrize(
    ("family", "buffer", "value"),
    [
        ("gpt2", "transformer.h.{}.attn.bias", torch.ones(1, 1, 64, 64).tril()),
        ("gpt_neox", "gpt_neox.layers.{}.attention.masked_bias", torch.tensor(-1e9)),
        ("gptj", "transformer.h.{}.attn.bias", torch.ones(1, 1, 64, 64).tril()),
        ("gptj", "transformer.h.{}.attn.masked_bias", torch.tensor(-1e9)),
        ("llama", "model.layers.{}.self_attn.rotary_emb.inv_freq", torch.ones(4)),
    ],
)
def test_blocks_may_hold_buffers_that_nobody_trains(
    family: str, buffer: str, value: torch.Tensor, tmp_path: Path
) -> None:
    model = save_tiny(family, tmp_path / "model")
    before = logits_of(load_model(model))
    file = model / "model.safetensors"
    buffers = {buffer.format(index): value.clone() for index in range(NUM_BLOCKS)}
    save_file({**load_file(file), **buffers}, file, metadata={"format": "pt"})
    bundle = cut(model, CUT, tmp_path / "bundle")
    for method in ("full", "lora", "bitfit") if family != "llama" else ("full", "lora"):
        make_adapter(bundle, tmp_path / method, method=method)
        plug(model, tmp_path / method, tmp_path / f"plugged-{method}")
        assert same_bytes(stored(tmp_path / f"plugged-{method}"), stored(model))
        assert torch.equal(logits_of(load_model(tmp_path / f"plugged-{method}")), before)
