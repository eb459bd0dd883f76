# SPDX-License-Identifier: Apache-2.0
"""The loss of the full model without some of its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offsite_ray.architectures import StandIn, get_blocks, load_model, set_blocks
from offsite_ray.calibration.text import inputs_of, targets_in
from offsite_ray.training.batches import sum_cross_entropy

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from offsite_ray.full_model import FullModel
    from offsite_ray.training.protocols import Batch


class _Switched(StandIn):
    """A block that can be left out."""

    attributes_of = "block"

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.on = True
        self._rest: tuple[Any, ...] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the block does, or the hidden states as they are, in the same form."""
        if self.on:
            output = self.block(hidden_states, *args, **kwargs)
            self._rest = output[1:] if isinstance(output, tuple) else None
            return output
        return hidden_states if self._rest is None else (hidden_states, *self._rest)


class PartialLoss:
    """The loss of a model in memory without some of its blocks, on the same text."""

    def __init__(self, full: FullModel, batches: Sequence[Batch]) -> None:
        """Load the full model.

        Args:
            full: The full model, which fits into memory.
            batches: Rows of text, nothing of it padding.
        """
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = load_model(full.path, device=self._device)
        blocks = [_Switched(block) for block in get_blocks(self._model, full.arch)]
        set_blocks(self._model, full.arch, nn.ModuleList(blocks))
        self._blocks = blocks
        self._batches = batches
        with torch.no_grad():  # so that every block knows the form of its output
            self._model(input_ids=batches[0]["input_ids"][:1].to(self._device), use_cache=False)

    @torch.no_grad()
    def __call__(self, dropped: Collection[int]) -> float:
        """Return the mean cross-entropy of the next token, in nats, without some blocks."""
        for index, block in enumerate(self._blocks):
            block.on = index not in dropped
        total = torch.zeros((), dtype=torch.float64)
        for batch in self._batches:
            logits = self._model(**inputs_of(batch, self._device), use_cache=False).logits
            labels = batch["labels"].to(self._device)
            total += sum_cross_entropy(logits, labels).double().cpu()
        return float(total) / targets_in(self._batches)
