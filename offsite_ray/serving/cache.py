# SPDX-License-Identifier: Apache-2.0
"""A cache of keys and values whose rows join and leave between decoding steps.

The tokens of every row end at the same column, so a step writes one column of all rows, and what
stock models make of a padded batch (masks, ALiBi, sliding windows) holds as it is. A row that joins
brings its own tokens, which are copied in so that they end there too.

::

    columns      begin            end
    row 0          . . . a a a a a
    row 1          b b b b b b b b
    row 2          . . . . . . c c
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_SLACK = 64
"""Columns that are taken more than are needed, so that rows move only now and then."""


class Window:
    """Which columns are in use, and how many tokens of each row; one for all layers."""

    def __init__(self) -> None:
        """Hold no row."""
        self.lengths: list[int] = []
        self.end = 0

    @property
    def width(self) -> int:
        """Columns in use: as many as the longest row has tokens."""
        return max(self.lengths, default=0)

    @property
    def begin(self) -> int:
        """First column in use."""
        return self.end - self.width


class WindowLayer(CacheLayerMixin):
    """Keys and values of one layer: ``(rows, heads, columns, head size)``."""

    is_sliding = False

    def __init__(self, window: Window) -> None:
        """Hold nothing yet; what the layer's tensors look like is seen when some come."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take memory for the first rows."""
        rows, columns = len(self.window.lengths), self.window.end + key_states.shape[2] + _SLACK
        self.keys = _room(key_states, rows, columns)
        self.values = _room(value_states, rows, columns)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write new columns at the end of all rows; return all that are in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, end, new = self.window.begin, self.window.end, key_states.shape[2]
        both = []
        for name, states in (("keys", key_states), ("values", value_states)):
            kept = getattr(self, name)
            kept[: len(states), :, end : end + new] = states
            both.append(kept[: len(states), :, begin : end + new])
        return both[0], both[1]

    def get_seq_length(self) -> int:
        """Return the number of columns in use."""
        return self.window.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns that a query sees, and the first of them."""
        return self.window.width + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: memory is taken as rows grow."""
        return -1


class WindowCache(Cache):
    """The cache of every layer of a model."""

    layers: list[Any]
    """One :class:`WindowLayer` for each; transformers' own word for it allows other kinds."""

    def __init__(self, num_layers: int) -> None:
        """Hold no row."""
        self.window = Window()
        super().__init__(layers=[WindowLayer(self.window) for _ in range(num_layers)])

    @property
    def num_rows(self) -> int:
        """Rows that are decoded."""
        return len(self.window.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes that the keys and values have taken."""
        return sum(
            tensor.nbytes
            for layer in self.layers
            for tensor in (layer.keys, layer.values)
            if tensor is not None
        )

    def begin(self, num_rows: int) -> None:
        """Start with empty rows, which the next forward fills; only of a cache without rows."""
        self.window.lengths = [0] * num_rows

    def mask(self, num_new: int, padding: Sequence[int] | None = None) -> Tensor:
        """Return ``(rows, columns + num_new)`` of a forward of some new tokens: 1 is a token.

        Args:
            num_new: Columns that the forward adds.
            padding: How many of them are empty in each row, at their beginning.
        """
        columns = torch.arange(self.window.width + num_new)
        lengths = torch.tensor(self.window.lengths)
        if padding is not None:
            lengths = lengths - torch.tensor(padding)
        return (columns >= (self.window.width - lengths)[:, None]).long()

    def positions(self, num_new: int, padding: Sequence[int] | None = None) -> Tensor:
        """Return each new token's position in its own row, ``(rows, num_new)``; 0 of padding."""
        first = torch.tensor(self.window.lengths)
        if padding is not None:
            first = first - torch.tensor(padding)
        return (first[:, None] + torch.arange(num_new)).clamp_min(0)

    def make_room(self, num_new: int) -> None:
        """Have room for the columns that the next forward writes."""
        self._make_room(self.num_rows, num_new)

    def advance(self, num_new: int, padding: Sequence[int] | None = None) -> None:
        """Count the columns that a forward has written."""
        for row in range(self.num_rows):
            self.window.lengths[row] += num_new - (padding[row] if padding is not None else 0)
        self.window.end += num_new

    def join(self, other: WindowCache, rows: Sequence[int]) -> None:
        """Add rows of another cache, copied."""
        before, width = self.num_rows, self.window.width
        joining = [other.window.lengths[row] for row in rows]
        wide = max([width, *joining])
        for layer, source in zip(self.layers, other.layers, strict=True):
            if not layer.is_initialized:
                layer.keys, layer.values = source.keys[:0], source.values[:0]
                layer.is_initialized = True
        self._make_room(before + len(rows), 1, wide)
        begin = self.window.end
        self.window.lengths += joining
        for layer, source in zip(self.layers, other.layers, strict=True):
            for name in ("keys", "values"):
                kept, given = getattr(layer, name), getattr(source, name)
                for place, (row, length) in enumerate(zip(rows, joining, strict=True), before):
                    ends = other.window.end
                    kept[place, :, begin - length : begin] = given[row, :, ends - length : ends]

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Remove rows; return for each row that is left where it was before.

        The last rows move to the places of those that go.
        """
        gone, lengths = set(rows), self.window.lengths
        left = len(lengths) - len(gone)
        movers = [row for row in range(left, len(lengths)) if row not in gone]
        order = [movers.pop() if row in gone else row for row in range(left)]
        begin, end = self.window.begin, self.window.end
        for place, row in enumerate(order):
            if place != row:
                for layer in self.layers:
                    for kept in (layer.keys, layer.values):
                        kept[place, :, begin:end] = kept[row, :, begin:end]
        self.window.lengths = [lengths[row] for row in order]
        if not order:
            self._clear()
        return order

    def _clear(self) -> None:
        self.window.end = 0
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False

    def _make_room(self, num_rows: int, num_new: int, wide: int | None = None) -> None:
        """Have room for rows, and for columns behind (and, if wide, before) those in use."""
        width = self.window.width
        wide = max(width, wide or 0)
        first = self.layers[0]
        if not first.is_initialized:
            return
        has_rows, has_columns = first.keys.shape[0], first.keys.shape[2]
        fits = self.window.end >= wide and self.window.end + num_new <= has_columns
        if fits and has_rows >= num_rows:
            return
        columns = wide + num_new + _SLACK
        begin, end = self.window.begin, self.window.end
        rows = self.num_rows
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = _room(old, num_rows, columns)
                new[:rows, :, wide - width : wide] = old[:rows, :, begin:end]
                setattr(layer, name, new)
        self.window.end = wide


def _room(like: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Return zeros for rows and columns of keys or values like the ones given.

    Not empty memory: what is masked is still multiplied, by 0, and 0 times infinity is no number.
    """
    _, heads, _, size = like.shape
    return like.new_zeros(num_rows, heads, num_columns, size)
