# SPDX-License-Identifier: Apache-2.0
"""The loss of the full model without some of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from offsite_ray.calibration.forward import BlockwiseModel
from offsite_ray.calibration.text import targets_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from offsite_ray.full_model import FullModel
    from offsite_ray.training.protocols import Batch

_HELD_BYTES = 4 * 2**30
"""Blocks of a model that are no more than this together are read once, and not for each loss."""


@dataclass(frozen=True, slots=True)
class _Trunk:
    """Hidden states from which losses can go on that drop the same blocks below."""

    index: int
    """The block that they are before."""
    dropped: frozenset[int]
    """The blocks below it that are dropped."""
    states: tuple[Tensor, ...]
    """``(B, T, H)`` of each batch."""


class PartialLoss:
    """The loss of the full model without some of its blocks, on the same text."""

    def __init__(self, full: FullModel, batches: Sequence[Batch]) -> None:
        """Load what is outside the blocks.

        Args:
            full: The full model, on disk.
            batches: Rows of text, nothing of it padding.
        """
        self._model = BlockwiseModel(full, batches, held_bytes=_HELD_BYTES)
        self._num_blocks = full.arch.num_blocks
        self._num_targets = targets_in(batches)
        self._trunk: _Trunk | None = None

    @torch.no_grad()
    def __call__(self, dropped: Sequence[int]) -> float:
        """Return the mean cross-entropy of the next token, in nats, without some blocks.

        Who asks again with the same blocks but another last one, behind the one of before, does not
        wait for what is below: the hidden states before the last one named are kept.
        """
        last = dropped[-1] if dropped else None
        begin, states = self._begin(dropped)
        for index in range(begin, self._num_blocks):
            if index == last:
                below = frozenset(block for block in dropped if block < index)
                self._trunk = _Trunk(index, below, tuple(states))
            if index in dropped:
                continue
            block = self._model.block(index)
            for number, hidden in enumerate(states):
                states[number] = self._model.run(index, block, number, hidden)
        losses = (self._model.loss(number, hidden) for number, hidden in enumerate(states))
        return sum(float(loss.double()) for loss in losses) / self._num_targets

    def _begin(self, dropped: Sequence[int]) -> tuple[int, list[Tensor]]:
        """Return the block to begin with, and the hidden states before it."""
        trunk = self._trunk
        if trunk and trunk.dropped == {block for block in dropped if block < trunk.index}:
            return trunk.index, list(trunk.states)
        self._trunk = trunk = None  # its memory is wanted
        return 0, self._model.begin()
