# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in several files, for tests of what is read and written of them."""

from __future__ import annotations

from benchmarks.checkpoints import Checkpoint


def small_opt(blocks: int, width: int, shard_bytes: int) -> Checkpoint:
    sizes = {
        "vocab_size": 512,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    return Checkpoint(
        name="opt", title="", family="opt", plan="", config=sizes, shard_bytes=shard_bytes
    )
