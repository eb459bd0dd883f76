# SPDX-License-Identifier: Apache-2.0
"""Tiny random text models, one per family: small enough for a test, odd enough to catch a slip.

Per-block lists are aperiodic and sliding windows are shorter than a test's sequences, so a block in
the wrong place shows in the logits; no tensor is left at zeros or ones, so a missed tensor does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NUM_BLOCKS = 6
"""Blocks of every tiny model."""

_AutoModel: Any = AutoModelForCausalLM
"""The stock entry, whose constructors are untyped."""

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"

_NOISE = 0.02
_WINDOW = 8
_FULL, _SLIDING = "full_attention", "sliding_attention"
_LAYER_TYPES = [_SLIDING, _SLIDING, _FULL, _SLIDING, _FULL, _FULL]
_PER_BLOCK = ("layer_types", "no_rope_layers")

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GATED: dict[str, Any] = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_QWEN: dict[str, Any] = {**_GATED, "use_sliding_window": True, "sliding_window": _WINDOW}
_GEMMA: dict[str, Any] = {
    **_GATED,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": _WINDOW,
    "layer_types": _LAYER_TYPES,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {**_COMMON, "n_inner": 48, "tie_word_embeddings": True},
    "opt": {
        **{key: value for key, value in _COMMON.items() if key != "initializer_range"},
        "init_std": 0.1,
        "ffn_dim": 48,
        "tie_word_embeddings": True,
    },
    # bloom's feed-forward is four times the hidden size and its positions are unbounded
    "bloom": {
        **{key: value for key, value in _COMMON.items() if key != "max_position_embeddings"},
        "tie_word_embeddings": True,
    },
    "llama": {**_GATED, "tie_word_embeddings": False},
    "mistral": {**_GATED, "sliding_window": _WINDOW, "tie_word_embeddings": False},
    "mixtral": {
        **_GATED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": _WINDOW,
        "tie_word_embeddings": False,
    },
    "qwen2": {**_QWEN, "layer_types": _LAYER_TYPES, "tie_word_embeddings": True},
    "qwen3": {
        **_QWEN,
        "head_dim": 8,
        "layer_types": [_FULL, _SLIDING, _FULL, _FULL, _SLIDING, _SLIDING],
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        **_QWEN,
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "tie_word_embeddings": False,
    },
    "gemma2": {**_GEMMA, "tie_word_embeddings": True},
    "gemma3_text": {**_GEMMA, "tie_word_embeddings": True},
    "phi3": {
        **_GATED,
        "original_max_position_embeddings": 64,
        "sliding_window": _WINDOW,
        "tie_word_embeddings": False,
    },
    "gpt_neox": {**_COMMON, "intermediate_size": 48, "tie_word_embeddings": False},
    "gptj": {**_COMMON, "n_inner": 48, "rotary_dim": 4, "tie_word_embeddings": False},
    "falcon": {**_COMMON, "ffn_hidden_size": 48, "tie_word_embeddings": True},
    "olmo2": {**_GATED, "tie_word_embeddings": False},
    "granite": {
        **_GATED,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.25,
        "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    },
    "starcoder2": {**_GATED, "sliding_window": _WINDOW, "tie_word_embeddings": False},
    "stablelm": {**_GATED, "use_qkv_bias": True, "tie_word_embeddings": False},
    "smollm3": {
        **_GATED,
        "use_sliding_window": True,
        "sliding_window": _WINDOW,
        "layer_types": _LAYER_TYPES,
        "no_rope_layers": [0, 1, 0, 0, 1, 1],
        "tie_word_embeddings": False,
    },
    "gpt_oss": {
        **_GATED,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": _WINDOW,
        "layer_types": _LAYER_TYPES,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
        "tie_word_embeddings": False,
    },
}
"""Configuration of each family's tiny model, by ``model_type``."""


def _fit_blocks(kwargs: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Cut or repeat the table's own per-block lists to the number of blocks asked for."""
    blocks = kwargs["num_hidden_layers"]
    for key in _PER_BLOCK:
        if key in kwargs and key not in overrides:
            kwargs[key] = [kwargs[key][block % NUM_BLOCKS] for block in range(blocks)]


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """Return the configuration of a family's tiny model.

    Args:
        family: A key of ``FAMILIES``.
        **overrides: Configuration keys to set over the table's, by their common name
            (``num_hidden_layers``, never ``n_layer``).
    """
    kwargs = {**FAMILIES[family], **overrides}
    _fit_blocks(kwargs, overrides)
    config: PretrainedConfig = AutoConfig.for_model(family, **kwargs)
    return config


def _roughen(model: PreTrainedModel) -> None:
    """Move every parameter off its initial value; tied ones once."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(_NOISE * torch.randn(parameter.shape))


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Return a family's tiny model with random weights, in evaluation mode.

    The weights are drawn in float32 and rounded to ``dtype``, so one seed is one model. The global
    random state is left as it was.

    Args:
        family: A key of ``FAMILIES``.
        seed: Seed of the weights.
        dtype: Type of the weights.
        **overrides: Configuration keys to set over the table's.
    """
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = _AutoModel.from_config(config, dtype=torch.float32)
        _roughen(model)
    for parameter in model.parameters():  # model.to(dtype) would round the rotary buffers too
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.train(False)
    return model


def tiny_tokenizer(vocab_size: int = 128) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per printable ASCII character; ``<|endoftext|>`` is 0.

    It is a byte-level BPE without merges, not a word table: stock transformers load the tokenizer
    of some families (qwen2) as that, whatever the checkpoint says.

    Args:
        vocab_size: Most tokens to use; characters beyond it read as unknown.
    """
    characters = ["Ċ", "Ġ", *map(chr, range(ord("!"), ord("~") + 1))]  # newline and space first
    tokens = [END_OF_TEXT, UNKNOWN, *characters][:vocab_size]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: type[Any] = PreTrainedTokenizerFast  # its constructor is untyped
    wrapped: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )
    return wrapped


def save_tiny(
    family: str,
    directory: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str | None = None,
    **overrides: Any,
) -> Path:
    """Save a family's tiny model and the tiny tokenizer as a stock checkpoint directory.

    Args:
        family: A key of ``FAMILIES``.
        directory: Directory to write to.
        seed: Seed of the weights.
        dtype: Type of the weights.
        max_shard_size: Most bytes of one safetensors file; small values give several.
        **overrides: Configuration keys to set over the table's.
    """
    model = tiny_model(family, seed=seed, dtype=dtype, **overrides)
    sharding: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(directory, **sharding)
    tiny_tokenizer(model.config.vocab_size).save_pretrained(directory)
    return Path(directory)
