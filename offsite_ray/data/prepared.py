# SPDX-License-Identifier: Apache-2.0
"""Prepared directories: written from text, opened for a model."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from offsite_ray.architectures import Notice, load_tokenizer
from offsite_ray.bundle import atomic_directory, check_free, digest_file
from offsite_ray.data.documents import read_documents
from offsite_ray.data.encoding import encode
from offsite_ray.data.packing import COLUMNS, Packer
from offsite_ray.errors import DataError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from offsite_ray.config import PrepareConfig

DATA_MANIFEST = "offsite-data.json"
BLOCKS_FILE = "blocks.parquet"

_ROWS_PER_GROUP = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareResult:
    """What ``prepare`` made."""

    out: str
    num_blocks: int
    block_size: int
    num_documents: int
    num_tokens: int
    num_targets: int
    """Tokens that are to be predicted."""
    num_truncated: int
    """Completions that were longer than a block and lost their end."""
    tokenizer: str
    """Digest of the tokenizer's ``tokenizer.json``."""
    digest: str
    """Digest of the blocks; the same text, tokenizer and block size give the same."""
    seconds: float


def is_prepared(source: str | Path) -> bool:
    """Return whether a path is a prepared directory."""
    return os.path.isfile(Path(source) / DATA_MANIFEST)  # of a text for a name: no, not an error


def prepare(config: PrepareConfig, notice: Notice | None = None) -> PrepareResult:
    """Tokenise text and pack it into blocks, as a Parquet directory.

    Raises:
        DataError: A source cannot be read, or holds less than a block.
        StorageError: The tokenizer is missing, or ``out`` is taken.
    """
    return write_blocks(config.text, config.tokenizer, config.block_size, Path(config.out), notice)


def write_blocks(
    sources: Sequence[str],
    tokenizer_dir: str | Path,
    block_size: int,
    out: Path,
    notice: Notice | None = None,
) -> PrepareResult:
    """Write a prepared directory; see :func:`prepare`."""
    start = time.perf_counter()
    check_free(out)
    if block_size < 2:
        raise DataError(f"a block of {block_size} tokens predicts nothing; give at least 2")
    tokenizer = load_tokenizer(tokenizer_dir)
    packer = Packer(block_size=block_size, pad=tokenizer.pad_token_id or 0)
    with atomic_directory(out) as tmp:
        schema = pa.schema([(name, pa.list_(pa.int32())) for name in COLUMNS])
        with pq.ParquetWriter(tmp / BLOCKS_FILE, schema, compression="zstd") as writer:
            examples = (encode(document, tokenizer) for document in read_documents(sources))
            for rows in _groups(packer.blocks(examples)):
                columns = {name: [row[name] for row in rows] for name in COLUMNS}
                writer.write_table(pa.table(columns, schema=schema))
        packer.check(sources)
        if packer.num_truncated and notice is not None:
            notice(
                f"{packer.num_truncated} examples are longer than {block_size} tokens and were cut"
            )
        result = PrepareResult(
            out=str(out),
            num_blocks=packer.num_blocks,
            block_size=block_size,
            num_documents=packer.num_documents,
            num_tokens=packer.num_tokens,
            num_targets=packer.num_targets,
            num_truncated=packer.num_truncated,
            tokenizer=tokenizer_digest(tokenizer_dir),
            digest=digest_file(tmp / BLOCKS_FILE),
            seconds=time.perf_counter() - start,
        )
        record = {key: value for key, value in asdict(result).items() if key != "out"}
        (tmp / DATA_MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return result


def tokenizer_digest(directory: str | Path) -> str:
    """Return the digest of a tokenizer's ``tokenizer.json``, by which two tokenizers compare."""
    file = Path(directory) / "tokenizer.json"
    if not file.is_file():
        raise StorageError(
            f"{directory} has no tokenizer.json; save its tokenizer with this transformers"
        )
    return digest_file(file)


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for row in rows:
        group.append(row)
        if len(group) == _ROWS_PER_GROUP:
            yield group
            group = []
    if group:
        yield group


class TokenBlocks:
    """The rows of a prepared directory (or some of them) as tensors, by index."""

    def __init__(self, columns: Mapping[str, Any], rows: Sequence[int]) -> None:
        """Take columns ``(N, T)`` and the indices of the rows that belong."""
        self._columns = columns
        self._rows = rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row: ``input_ids``, ``labels`` and ``position_ids``, each ``(T,)`` int64."""
        row = self._rows[index]
        return {
            name: torch.from_numpy(column[row].astype(np.int64))
            for name, column in self._columns.items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """A prepared directory, opened."""

    path: Path
    block_size: int
    num_blocks: int
    tokenizer: str
    """Digest of the tokenizer that it was made with."""
    digest: str | None = None
    """Digest of the blocks; None for blocks that ``prepare`` did not write."""


def open_prepared(path: str | Path, tokenizer_dir: str | Path, vocab_size: int) -> PreparedData:
    """Return a prepared directory that fits a model.

    Raises:
        DataError: It is damaged, or was made with another tokenizer.
    """
    file = Path(path) / DATA_MANIFEST
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        data = PreparedData(
            path=Path(path),
            block_size=int(record["block_size"]),
            num_blocks=int(record["num_blocks"]),
            tokenizer=str(record["tokenizer"]),
            digest=str(record["digest"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged: {error!r}; run 'offsite-ray prepare' again") from error
    if data.tokenizer != tokenizer_digest(tokenizer_dir):
        raise DataError(
            f"{path} was prepared with another tokenizer than that of {tokenizer_dir}; run "
            f"'offsite-ray prepare --tokenizer {tokenizer_dir}'"
        )
    blocks = data.path / BLOCKS_FILE
    if not blocks.is_file() or digest_file(blocks) != data.digest:
        raise DataError(f"{blocks} is missing or was altered; run 'offsite-ray prepare' again")
    largest = int(read_columns(data.path)["input_ids"].max())
    if largest >= vocab_size:
        raise DataError(
            f"{path} holds token {largest}, and the model knows {vocab_size}: the tokenizer does "
            "not belong to it"
        )
    return data


def read_columns(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the columns of a prepared directory as int32 arrays of shape ``(N, T)``."""
    try:
        table = pq.read_table(path / BLOCKS_FILE, columns=list(COLUMNS), memory_map=True)
        arrays = {}
        for name in COLUMNS:
            flat = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
            arrays[name] = flat.reshape(table.num_rows, -1)
        return arrays
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path / BLOCKS_FILE} is damaged: {error}") from error


def split_blocks(path: Path, eval_fraction: float, seed: int) -> tuple[TokenBlocks, TokenBlocks]:
    """Return the rows to train on and the held-out ones, drawn by ``seed``.

    Raises:
        DataError: There are not two rows, one for each.
    """
    columns = read_columns(path)
    count = len(columns["input_ids"])
    if count < 2:
        raise DataError(
            f"the data makes {count} block, and one is held out for evaluation; give more text or "
            "a smaller --seq-len"
        )
    order = np.random.default_rng(seed).permutation(count)
    num_held_out = min(count - 1, max(1, round(count * eval_fraction)))
    return (
        TokenBlocks(columns, np.sort(order[num_held_out:]).tolist()),
        TokenBlocks(columns, np.sort(order[:num_held_out]).tolist()),
    )
