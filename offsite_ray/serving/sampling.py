# SPDX-License-Identifier: Apache-2.0
"""The next token of each row, from its logits and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offsite_ray.serving.requests import Sampling, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Sampler:
    """Chooses the tokens of one text."""

    def __init__(self, sampling: Sampling, index: int, device: torch.device) -> None:
        """Take what was asked for.

        Args:
            sampling: Of the request.
            index: Which of its texts; each of them draws differently.
            device: Of the logits.
        """
        self.greedy = sampling.temperature == 0
        self._num_top = sampling.logprobs
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed + index)
        # In the order in which transformers' own generate applies them.
        warpers: list[object] = []
        if not self.greedy and sampling.temperature != 1:
            warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        self._warpers = LogitsProcessorList(warpers)

    def choose(self, logits: Tensor) -> int:
        """Return a token.

        Args:
            logits: ``(V,)``, float32.
        """
        if self.greedy:
            return int(logits.argmax())
        scores = self._warpers(torch.empty(1, 0, dtype=torch.long), logits[None])  # type: ignore[arg-type]
        chances = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(chances, 1, generator=self._generator))

    def explain(self, logits: Tensor, token: int) -> TokenLogprob | None:
        """Return the model's own log-probabilities, before temperature; None if not asked for."""
        return None if self._num_top is None else explain(logits[None], [token], self._num_top)[0]


def explain(logits: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Return how likely each of some tokens was, and what was likeliest in its place.

    Args:
        logits: ``(T, V)``, before each token.
        tokens: ``T`` of them.
        num_top: How many of the likeliest to name.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    top = logprobs.topk(num_top)
    chosen = logprobs[range(len(tokens)), list(tokens)].tolist()
    return [
        TokenLogprob(token=token, logprob=own, top=dict(zip(indices, values, strict=True)))
        for token, own, indices, values in zip(
            tokens, chosen, top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]
