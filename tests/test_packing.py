# SPDX-License-Identifier: Apache-2.0
"""Packing: the fast one against one that places token after token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offsite_ray.data import IGNORED, packing
from offsite_ray.data.encoding import Example
from offsite_ray.data.packing import COLUMNS, Packer


def packed_simply(examples: list[Example], size: int) -> list[tuple[list[int], ...]]:
    """Return tokens, labels and positions of each block, one token after the other."""
    rows: list[tuple[list[int], ...]] = [([], [], [])]
    for example in examples:
        tokens = example.tokens.tolist()
        if not example.divisible:
            tokens = tokens[:size]
            if len(rows[-1][0]) + len(tokens) > size:
                rows.append(([], [], []))
        first = 0
        for place, token in enumerate(tokens):
            if len(rows[-1][0]) == size:
                rows.append(([], [], []))
                first = place
            wanted = example.targets[place] and place > first
            for column, value in zip(
                rows[-1], (token, token if wanted else IGNORED, place - first), strict=True
            ):
                column.append(value)
    for tokens, labels, positions in rows:
        missing = size - len(tokens)
        tokens += [9] * missing
        labels += [IGNORED] * missing
        positions += range(missing)
    return rows


@settings(max_examples=300, deadline=None)
@given(
    documents=st.lists(
        st.tuples(st.lists(st.booleans(), min_size=1, max_size=30), st.booleans()), max_size=20
    ),
    size=st.integers(2, 12),
    group=st.integers(1, 40),
)
def test_packing_is_that_of_one_token_after_the_other(
    documents: list[tuple[list[bool], bool]], size: int, group: int
) -> None:
    examples = [
        Example(np.arange(100, 100 + len(wanted), dtype=np.int32), np.array(wanted), divisible)
        for wanted, divisible in documents
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_GROUP_TOKENS", group)
        packer = Packer(block_size=size, pad=9)
        groups = [*packer.blocks(examples)]
        rest = packer.rest()
        groups += packer.last()
        alone = Packer(block_size=size, pad=9)
        assert not list(alone.blocks(rest))
        again = [block for blocks in alone.last() for block in blocks["input_ids"].tolist()]
    columns = [[row for blocks in groups for row in blocks[name].tolist()] for name in COLUMNS]
    rows = list(zip(*columns, strict=True))
    assert rows == (packed_simply(examples, size) if examples else [])
    assert again == ([rows[-1][0]] if rest else [])
