# SPDX-License-Identifier: Apache-2.0
"""Forwards of a batch whose rows are of several tenants, for every family alike."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.serving.cache import WindowCache
from offsite_ray.serving.routing import Router

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from offsite_ray.architectures import Architecture


class BatchModel:
    """A full model that computes rows of several tenants at once."""

    def __init__(self, model: PreTrainedModel, arch: Architecture) -> None:
        """Take a model in evaluation mode, which is changed as tenants come."""
        self.router = Router(model, arch)
        self._model = model
        self._num_layers = arch.num_blocks
        takes = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._takes_positions = "position_ids" in takes

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self._model.dtype

    def new_cache(self, num_rows: int = 0) -> WindowCache:
        """Return a cache with some empty rows."""
        cache = WindowCache(self._num_layers)
        cache.begin(num_rows)
        return cache

    @torch.inference_mode()
    def forward(
        self,
        tokens: Sequence[Sequence[int]],
        tenants: Sequence[int],
        cache: WindowCache,
        *,
        every: bool = False,
    ) -> Tensor:
        """Return the logits behind the last token of each row, ``(B, 1, V)`` in float32.

        Args:
            tokens: New tokens of each row of the cache; shorter rows must be empty in the cache.
            tenants: Number of the tenant of each row.
            cache: What came before; the new tokens are in it afterwards.
            every: Return them behind every new token, ``(B, T, V)``; shorter rows end together
                with the longest.
        """
        width = max(map(len, tokens))
        padding = [width - len(row) for row in tokens]
        ids = torch.tensor([[0] * pad + list(r) for pad, r in zip(padding, tokens, strict=True)])
        given: dict[str, Any] = {
            "input_ids": ids.to(self.device),
            "attention_mask": cache.mask(width, padding).to(self.device),
            "past_key_values": cache,
            "use_cache": True,
            **({} if every else self._last_only),
        }
        if self._takes_positions:
            given["position_ids"] = cache.positions(width, padding).to(self.device)
        self.router.expect(tenants)
        cache.make_room(width)
        logits: Tensor = self._model(**given).logits
        cache.advance(width, padding)
        return (logits if every else logits[:, -1:]).float()
