# SPDX-License-Identifier: Apache-2.0
"""Packing documents into blocks of equal length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from offsite_ray.data.encoding import Example

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

IGNORED = -100
"""Label of a position where nothing is to be predicted."""

COLUMNS = ("input_ids", "labels", "position_ids")
"""Columns of a block, in the order of the Parquet file."""

Blocks = dict[str, "np.ndarray[Any, Any]"]
"""Some blocks: each of :data:`COLUMNS` as int32, ``(N, T)``."""

_GROUP_TOKENS = 2**15


def blocks_in_group(block_size: int) -> int:
    """Return how many blocks are written, and later read, at once: some 400 KB of them."""
    return max(1, _GROUP_TOKENS // block_size)


class Packer:
    """Packs documents into blocks without gaps, and counts what it is given."""

    def __init__(self, *, block_size: int, pad: int) -> None:
        """Start with nothing packed."""
        self.block_size = block_size
        self.num_documents = self.num_tokens = self.num_truncated = 0
        self.divisible = True
        """Whether all documents were."""
        self._pad = pad
        size = blocks_in_group(block_size) * block_size
        self._columns = {name: np.empty(size, np.int32) for name in COLUMNS}
        self._counting = np.arange(block_size, dtype=np.int32)
        self._filled = 0
        self._open: list[Example] = []

    def blocks(self, examples: Iterable[Example]) -> Iterator[Blocks]:
        """Yield groups of full blocks; what fills none is the rest."""
        for example in examples:
            if not len(example.tokens):
                continue
            self.num_documents += 1
            self.num_tokens += len(example.tokens)
            self.divisible &= example.divisible
            yield from self._pack(example)
        yield from self._take()

    def rest(self) -> list[Example]:
        """Return what is in the block that is not full."""
        return list(self._open)

    def last(self) -> Iterator[Blocks]:
        """Yield the block that is not full, padded, if there is one."""
        if self._open:
            self._fill_up()
            yield from self._take()

    @property
    def _room(self) -> int:
        """Tokens that the present block still takes."""
        return self.block_size - self._filled % self.block_size

    def _pack(self, example: Example) -> Iterator[Blocks]:
        if not example.divisible:
            if len(example.tokens) > self.block_size:
                self.num_truncated += 1
                example = _slice(example, 0, self.block_size)
            if len(example.tokens) > self._room:
                self._fill_up()
                yield from self._take(full=True)
        start = 0
        while start < len(example.tokens):
            end = start + self._room
            self._add(_slice(example, start, end))
            start = end
            yield from self._take(full=True)

    def _add(self, piece: Example) -> None:
        size = len(piece.tokens)
        place = slice(self._filled, self._filled + size)
        self._columns["input_ids"][place] = piece.tokens
        labels = self._columns["labels"][place]
        labels[:] = piece.tokens
        labels[~piece.targets] = IGNORED
        # The first token of a piece has no context of its own, so it is nobody's target.
        labels[0] = IGNORED
        self._columns["position_ids"][place] = self._counting[:size]
        self._open.append(piece)
        self._count(size)

    def _fill_up(self) -> None:
        size = self._room
        place = slice(self._filled, self._filled + size)
        self._columns["input_ids"][place] = self._pad
        self._columns["labels"][place] = IGNORED
        self._columns["position_ids"][place] = self._counting[:size]
        self._count(size)

    def _count(self, size: int) -> None:
        self._filled += size
        if self._filled % self.block_size == 0:
            self._open = []

    def _take(self, *, full: bool = False) -> Iterator[Blocks]:
        """Yield the full blocks, if there are any; ``full``: only when there is room for none."""
        whole = self._filled - self._filled % self.block_size
        if not whole or (full and self._filled < len(self._columns["input_ids"])):
            return
        yield {
            name: column[:whole].reshape(-1, self.block_size).copy()
            for name, column in self._columns.items()
        }
        for column in self._columns.values():
            column[: self._filled - whole] = column[whole : self._filled]
        self._filled -= whole


def _slice(example: Example, start: int, end: int) -> Example:
    return Example(example.tokens[start:end], example.targets[start:end], example.divisible)
