# SPDX-License-Identifier: Apache-2.0
"""Packing documents into blocks of equal length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from offsite_ray.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from offsite_ray.data.encoding import Example

IGNORED = -100
"""Label of a position where nothing is to be predicted."""

COLUMNS = ("input_ids", "labels", "position_ids")
"""Columns of a block, in the order of the Parquet file."""


class Packer:
    """Packs documents into blocks without gaps, and counts what it does."""

    def __init__(self, *, block_size: int, pad: int) -> None:
        """Start with nothing packed."""
        self.block_size = block_size
        self.pad = pad
        self.num_blocks = self.num_documents = self.num_tokens = 0
        self.num_targets = self.num_truncated = 0
        self._rows: dict[str, list[int]] = {name: [] for name in COLUMNS}
        self._divisible = True

    def blocks(self, examples: Iterable[Example]) -> Iterator[dict[str, Any]]:
        """Yield rows of int32 arrays of ``block_size``; the last is padded."""
        for example in examples:
            if not example.tokens:
                continue
            self.num_documents += 1
            self.num_tokens += len(example.tokens)
            self._divisible &= example.divisible
            yield from self._pack(example)
        if self._filled:
            yield self._take()

    def check(self, sources: Sequence[str]) -> None:
        """Refuse a text that does not fill a block; raise :class:`DataError`."""
        where = ", ".join(sources)
        if not self.num_targets:
            raise DataError(f"{where} holds nothing to predict; give a text that is not empty")
        if self._divisible and self.num_tokens < self.block_size:
            raise DataError(
                f"{where} has {self.num_tokens} tokens, fewer than a block of {self.block_size}; "
                "give more text or a smaller --seq-len (prepare: --block-size)"
            )

    @property
    def _filled(self) -> int:
        return len(self._rows["input_ids"])

    def _pack(self, example: Example) -> Iterator[dict[str, Any]]:
        tokens, targets = list(example.tokens), list(example.targets)
        if not example.divisible:
            if len(tokens) > self.block_size:
                self.num_truncated += 1
                tokens, targets = tokens[: self.block_size], targets[: self.block_size]
            if self._filled + len(tokens) > self.block_size:
                yield self._take()
        start = 0
        while start < len(tokens):
            end = start + self.block_size - self._filled
            self._add(tokens[start:end], targets[start:end])
            start = end
            if self._filled == self.block_size:
                yield self._take()

    def _add(self, tokens: list[int], targets: list[bool]) -> None:
        # The first token of a piece has no context of its own, so it is nobody's target.
        wanted = [False, *targets[1:]]
        self.num_targets += sum(wanted)
        self._rows["input_ids"] += tokens
        self._rows["labels"] += [
            token if want else IGNORED for token, want in zip(tokens, wanted, strict=True)
        ]
        self._rows["position_ids"] += range(len(tokens))

    def _take(self) -> dict[str, Any]:
        padding = self.block_size - self._filled
        fill = {"input_ids": self.pad, "labels": IGNORED}
        row = {}
        for name in COLUMNS:
            tail = [fill[name]] * padding if name in fill else list(range(padding))
            row[name] = np.asarray(self._rows[name] + tail, dtype=np.int32)
        self._rows = {name: [] for name in COLUMNS}
        self.num_blocks += 1
        return row
