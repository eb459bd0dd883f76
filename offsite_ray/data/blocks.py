# SPDX-License-Identifier: Apache-2.0
"""Blocks of prepared data as tensors, read when they are asked for."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from offsite_ray.data.manifest import read_data_manifest
from offsite_ray.data.packing import COLUMNS
from offsite_ray.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from offsite_ray.data.packing import Blocks
    from offsite_ray.data.writing import WrittenFile

_OPEN_FILES = 16
_GROUPS_IN_MEMORY = 64
"""Row groups, of some 400 KB each: a small text is read but once."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class BlockSource(Protocol):
    """Blocks by their index."""

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray[Any, Any]]:
        """Return a block: each of ``COLUMNS`` as an array ``(T,)``."""


class TokenBlocks:
    """Some of the blocks of prepared data as tensors, by index."""

    def __init__(self, blocks: BlockSource, rows: Sequence[int] | np.ndarray[Any, Any]) -> None:
        """Take the blocks, and the indices of those that belong."""
        self._blocks = blocks
        self._rows = rows

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._rows)

    def number(self, index: int) -> int:
        """Return which block of all the prepared ones a block of these is."""
        return int(self._rows[index])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a block: ``input_ids``, ``labels`` and ``position_ids``, each ``(T,)`` int64."""
        block = self._blocks[self.number(index)]
        return {name: torch.from_numpy(block[name].astype(np.int64)) for name in COLUMNS}


class BlockFiles:
    """The blocks of a prepared directory, however many: few of them are in memory at a time."""

    def __init__(self, folder: Path, files: Sequence[WrittenFile]) -> None:
        """Take the files in the order of their blocks; nothing is opened yet."""
        self._folder = folder
        self._files = files
        self._ends = np.cumsum([file.num_blocks for file in files])
        self._opened = _Recent(self._open, _OPEN_FILES)
        self._groups = _Recent(self._read, _GROUPS_IN_MEMORY)

    def __reduce__(self) -> tuple[type[BlockFiles], tuple[Path, Sequence[WrittenFile]]]:
        """Leave what is open or in memory to the process that it belongs to."""
        return BlockFiles, (self._folder, self._files)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray[Any, Any]]:
        """Return a block.

        Raises:
            DataError: Its file cannot be read.
        """
        number, inside = _located(self._ends, index)
        try:
            _, ends = self._opened[number]
            group, row = _located(ends, inside)
            return {name: blocks[row] for name, blocks in self._groups[number, group].items()}
        except (OSError, ValueError, IndexError, pa.ArrowException) as error:
            file = self._folder / self._files[number].name
            raise DataError(f"{file} is damaged: {error}") from error

    def _open(self, number: int) -> tuple[pq.ParquetFile, np.ndarray[Any, Any]]:
        """Return a file, and behind which of its blocks each row group ends."""
        file = pq.ParquetFile(self._folder / self._files[number].name)
        groups = range(file.num_row_groups)
        return file, np.cumsum([file.metadata.row_group(group).num_rows for group in groups])

    def _read(self, key: tuple[int, int]) -> Blocks:
        number, group = key
        file, _ = self._opened[number]
        table = file.read_row_group(group, columns=list(COLUMNS), use_threads=False)
        arrays = {}
        for name in COLUMNS:
            flat = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
            arrays[name] = flat.reshape(table.num_rows, -1)
        return arrays


def all_blocks(path: Path) -> TokenBlocks:
    """Return every prepared block, in the order of the files."""
    manifest = read_data_manifest(path)
    return TokenBlocks(BlockFiles(path, manifest.files), range(manifest.num_blocks))


def split_blocks(path: Path, eval_fraction: float, seed: int) -> tuple[TokenBlocks, TokenBlocks]:
    """Return the blocks to train on and the held-out ones, drawn by ``seed``.

    Raises:
        DataError: There are not two blocks, one for each.
    """
    manifest = read_data_manifest(path)
    count = manifest.num_blocks
    if count < 2:
        raise DataError(
            f"the data makes {count} block, and one is held out for evaluation; give more text or "
            "a smaller --seq-len"
        )
    order = np.random.default_rng(seed).permutation(count)
    num_held_out = min(count - 1, max(1, round(count * eval_fraction)))
    return (
        # Files of their own: the ones are read ahead in a thread while the others are read.
        TokenBlocks(BlockFiles(path, manifest.files), np.sort(order[num_held_out:])),
        TokenBlocks(BlockFiles(path, manifest.files), np.sort(order[:num_held_out])),
    )


def _located(ends: np.ndarray[Any, Any], index: int) -> tuple[int, int]:
    """Return in which of several ranges, laid end to end, an index is, and where inside it."""
    number = int(np.searchsorted(ends, index, side="right"))
    return number, index - (int(ends[number - 1]) if number else 0)


class _Recent(Generic[_Key, _Value]):
    """Values that were made of keys; the least recently used ones are dropped."""

    def __init__(self, make: Callable[[_Key], _Value], size: int) -> None:
        self._make = make
        self._size = size
        self._values: OrderedDict[_Key, _Value] = OrderedDict()

    def __getitem__(self, key: _Key) -> _Value:
        if key not in self._values:
            self._values[key] = self._make(key)
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]
