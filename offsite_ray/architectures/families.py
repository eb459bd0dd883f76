# SPDX-License-Identifier: Apache-2.0
"""The table of model families: where the blocks are, and what in the config belongs to a block.

A family is a row. Whatever is not in its block list (embeddings, final norm, head) is carried along
unchanged, so a row says nothing about it; a family of another modality is a row with another
``auto_class`` and ``main_input``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ConfigValues = Mapping[str, Any]
ConfigRule = Callable[[ConfigValues, Sequence[int]], dict[str, Any]]
"""``(config values, kept blocks) -> changed values`` for a model that keeps these blocks."""

BLOCK_LISTS = (
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "no_rope_layers",
    "sliding_windows",
    "num_key_value_heads_per_layer",
    "num_attention_heads_per_layer",
)
"""Names of config lists with one entry for each block, in any family."""


def gather_lists(names: Sequence[str] = BLOCK_LISTS) -> ConfigRule:
    """Return the rule that keeps the entries of the kept blocks, by original index."""

    def rule(values: ConfigValues, kept: Sequence[int]) -> dict[str, Any]:
        present = [name for name in names if isinstance(values.get(name), list | tuple)]
        return {name: [values[name][index] for index in kept] for name in present}

    return rule


def spell_out_dense_blocks(values: ConfigValues, kept: Sequence[int]) -> dict[str, Any]:
    """Name the blocks without experts one by one, where the config has them by a stride.

    Block ``i`` has experts if it is not in ``mlp_only_layers`` and ``i + 1`` is a multiple of
    ``decoder_sparse_step`` (transformers, ``Qwen3MoeDecoderLayer``).
    """
    stride = values["decoder_sparse_step"]
    dense = [
        position
        for position, index in enumerate(kept)
        if index in (values["mlp_only_layers"] or ()) or (index + 1) % stride != 0
    ]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What cutting a stack of blocks needs to know about a kind of model."""

    model_type: str
    """``model_type`` of its config."""
    blocks: str
    """Path of the block list in the model in memory, e.g. ``model.layers``."""
    auto_class: str = "AutoModelForCausalLM"
    """The class of transformers that loads it."""
    main_input: str = "input_ids"
    """Name of the forward argument that holds the examples."""
    modality: Literal["text", "image"] = "text"
    config_rules: tuple[ConfigRule, ...] = (gather_lists(),)
    """What besides the number of blocks changes in the config, in order."""
    position_dependent: Mapping[str, Any] | None = None
    """Config values with which a block computes with its own index, so that it cannot move."""
    unused: str | None = None
    """Regular expression of tensors in its checkpoints that no model computes with."""


def _text(model_type: str, blocks: str = "model.layers", **columns: Any) -> Family:
    return Family(model_type=model_type, blocks=blocks, **columns)


_ROWS = (
    _text(
        "gpt2",
        "transformer.h",
        position_dependent={"scale_attn_by_inverse_layer_idx": True},
    ),
    _text("opt", "model.decoder.layers"),
    _text("bloom", "transformer.h"),
    _text("llama"),
    _text("mistral"),
    _text("mixtral"),
    _text("qwen2"),
    _text("qwen3"),
    _text("qwen3_moe", config_rules=(gather_lists(), spell_out_dense_blocks)),
    _text("gemma2"),
    _text("gemma3_text"),
    _text("phi3"),
    _text("gpt_neox", "gpt_neox.layers"),
    _text("gptj", "transformer.h", unused=r".*\.attn\.(masked_)?bias"),
    _text("falcon", "transformer.h"),
    _text("olmo2"),
    _text("granite"),
    _text("starcoder2"),
    _text("stablelm"),
    _text("smollm3"),
    _text("gpt_oss"),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _ROWS}
"""Every family by the ``model_type`` of its config."""


def used(model_type: str, names: Iterable[str]) -> list[str]:
    """Return names of tensors, sorted, without those that a family has for nothing."""
    unused = FAMILIES[model_type].unused if model_type in FAMILIES else None
    return sorted(name for name in names if unused is None or not re.fullmatch(unused, name))
