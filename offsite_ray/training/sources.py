# SPDX-License-Identifier: Apache-2.0
"""From what the user names as data to a prepared directory that fits the model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from offsite_ray.data import (
    PreparedData,
    is_prepared,
    open_prepared,
    write_blocks,
)
from offsite_ray.errors import ConfigError
from offsite_ray.uris import shown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers.configuration_utils import PretrainedConfig

    from offsite_ray.architectures import Notice

_DEFAULT_SEQ_LEN = 1024


def prepared_for(
    sources: Sequence[str],
    model_dir: Path,
    config: PretrainedConfig,
    seq_len: int | None,
    run_dir: Path,
    notice: Notice | None,
) -> PreparedData:
    """Return prepared data for a model: the user's own, or made in the run's directory.

    Raises:
        ConfigError: ``seq_len`` is more than the model has positions, or not the data's.
        DataError: The data cannot be read, or belongs to another tokenizer.
    """
    row_length(config, seq_len, None)
    prepared = [source for source in sources if is_prepared(source)]
    if prepared and len(sources) > 1:
        name = shown(prepared[0])
        raise ConfigError(f"{name} is prepared data; give it alone, or prepare all together")
    if not prepared:
        data = run_dir / "data"
        if not is_prepared(data):
            write_blocks(sources, model_dir, row_length(config, seq_len, None), data, notice)
        return open_prepared(data, model_dir, config.vocab_size)
    found = open_prepared(prepared[0], model_dir, config.vocab_size)
    row_length(config, seq_len, found.block_size)
    return found


def row_length(config: PretrainedConfig, seq_len: int | None, block_size: int | None) -> int:
    """Return the tokens of a row of data for a model.

    Args:
        config: Of the model.
        seq_len: What is asked for; None: what is usual.
        block_size: Of data that is prepared already; None: it is yet to be.

    Raises:
        ConfigError: The model has fewer positions, or the data is of another length.
    """
    # A model without position embeddings, as BLOOM, takes sequences of any length.
    longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if seq_len is not None and seq_len > longest:
        raise ConfigError(f"seq_len={seq_len} is more than the model's {longest} positions")
    if block_size is None:
        return seq_len or min(longest, _DEFAULT_SEQ_LEN)
    if block_size > longest:
        raise ConfigError(
            f"the data has blocks of {block_size} tokens, more than the model's {longest} "
            f"positions; prepare it with --block-size {longest}"
        )
    if seq_len not in (None, block_size):
        raise ConfigError(
            f"the data has blocks of {block_size} tokens, not seq_len={seq_len}; leave --seq-len "
            "out, or prepare the text anew"
        )
    return block_size
