# SPDX-License-Identifier: Apache-2.0
"""Text to blocks of tokens: reading, tokenising, packing, and prepared Parquet directories.

A row has ``input_ids``, ``labels`` (-100 where nothing is to be predicted) and ``position_ids``
(from 0 in each document), all of ``block_size`` int32. Labels are not shifted: the one at ``t`` is
what the logits at ``t - 1`` should predict, as in transformers.
"""

from offsite_ray.data.blocks import BlockFiles, TokenBlocks, all_blocks, split_blocks
from offsite_ray.data.documents import read_documents
from offsite_ray.data.packing import IGNORED
from offsite_ray.data.prepared import (
    PartsRecord,
    PreparedData,
    PrepareResult,
    check_files,
    is_prepared,
    open_prepared,
    prepare,
    tokenizer_digest,
    write_blocks,
    write_here,
)
from offsite_ray.data.writing import PartWriter, WrittenPart
from offsite_ray.storage import place_of

__all__ = [
    "IGNORED",
    "BlockFiles",
    "PartWriter",
    "PartsRecord",
    "PrepareResult",
    "PreparedData",
    "TokenBlocks",
    "WrittenPart",
    "all_blocks",
    "check_files",
    "is_prepared",
    "open_prepared",
    "place_of",
    "prepare",
    "read_documents",
    "split_blocks",
    "tokenizer_digest",
    "write_blocks",
    "write_here",
]
