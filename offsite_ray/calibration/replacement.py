# SPDX-License-Identifier: Apache-2.0
"""Harmonizers in the place of blocks, and what it is worth to keep each block (ScaleOT).

In the first half of the steps, blocks and harmonizers are mixed at random: the harmonizers learn,
and the scores of the blocks, on which the draws hang, learn from the losses of other draws on other
text. In the second half, the harmonizers that stay learn beside the blocks that stay.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offsite_ray.architectures import StandIn, get_blocks, harmonizer, load_model, set_blocks
from offsite_ray.calibration.text import inputs_of, targets_in
from offsite_ray.errors import FamilyError
from offsite_ray.selection import highest
from offsite_ray.training.batches import collate, sum_cross_entropy

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from offsite_ray.full_model import FullModel
    from offsite_ray.training.protocols import Batch

_STEP_TOKENS = 512
"""Of a batch, unless a row has more."""
_LEARNING_RATE = 1e-3
"""Of the harmonizers."""
_SCORE_RATE = 0.1
"""Of the scores."""
_NUM_DRAWS = 3
"""Draws that are compared in a step."""

_SCORES = "scores"


@dataclass(frozen=True, kw_only=True, slots=True)
class HarmonizerTraining:
    """How harmonizers are trained."""

    rank: int
    """Their inner channels."""
    steps: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Replacement:
    """What was learnt."""

    scores: Mapping[int, float]
    """Of each block of the middle, by absolute index."""
    harmonizers: Mapping[int, Mapping[str, Tensor]]
    """Of each dropped block, by absolute index: parameters, by their path in the block."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it as tensors by name."""
        named = {
            f"{index}|{path}": tensor
            for index, parameters in self.harmonizers.items()
            for path, tensor in parameters.items()
        }
        return {_SCORES: torch.tensor([*self.scores.values()], dtype=torch.float64), **named}

    @staticmethod
    def of(middle: Sequence[int], tensors: Mapping[str, Tensor]) -> Replacement:
        """Return what :meth:`tensors` said of the blocks ``middle``."""
        harmonizers: dict[int, dict[str, Tensor]] = {}
        for name in sorted(tensors.keys() - {_SCORES}):
            index, path = name.split("|")
            harmonizers.setdefault(int(index), {})[path] = tensors[name]
        scores = dict(zip(middle, tensors[_SCORES].tolist(), strict=True))
        return Replacement(scores=scores, harmonizers=harmonizers)


def draw(scores: Mapping[int, float], num_kept: int, source: random.Random) -> list[int]:
    """Return blocks to keep: those with the highest actions ``pi_i ~ U(0, sigmoid(s_i))``."""
    return highest({i: source.uniform(0, _sigmoid(s)) for i, s in scores.items()}, num_kept)


def rewarded(
    scores: Mapping[int, float], draws: Sequence[Collection[int]], losses: Sequence[float]
) -> dict[int, float]:
    """Return the scores after some draws: a block gains by those better than the mean that keep it.

    ``s_i += 0.1 sum_j r_j sigmoid'(s_i)`` over the draws ``j`` that keep block ``i``, with
    ``r_j = exp(-l_j) - mean_k exp(-l_k)``.

    Args:
        scores: Of each block.
        draws: The blocks that each keeps.
        losses: Of each, in nats a token.
    """
    gains = [math.exp(-loss) for loss in losses]
    mean = sum(gains) / len(gains)
    found = {}
    for block, score in scores.items():
        reward = sum(g - mean for g, kept in zip(gains, draws, strict=True) if block in kept)
        slope = _sigmoid(score) * (1 - _sigmoid(score))
        found[block] = score + _SCORE_RATE * reward * slope
    return found


def _sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score))


def learn_replacement(
    full: FullModel,
    rows: Sequence[Mapping[str, Tensor]],
    middle: Sequence[int],
    num_kept: int,
    how: HarmonizerTraining,
) -> Replacement:
    """Learn which blocks to keep, and what stands in the place of the others.

    Args:
        full: The full model, which fits into memory in float32.
        rows: Rows of text, nothing of it padding; of the last quarter come the rewards.
        middle: Absolute indices of the blocks that may be replaced.
        num_kept: How many of them stay.
        how: Rank, steps and seed.

    Raises:
        FamilyError: Nothing in the form of the model's blocks can stand in their place.
        ConfigError: The rank is more than their inner width.
    """
    source, mixed = random.Random(how.seed), MixedModel(full, middle, how)
    size = max(1, _STEP_TOKENS // len(rows[0]["input_ids"]))
    cut = max(1, len(rows) * 3 // 4)
    learn, judge = (part if len(part) else rows for part in (rows[:cut], rows[cut:]))
    scores = dict.fromkeys(middle, 0.0)
    for step in range(how.steps // 2):
        mixed.train(_batch(learn, step, size), draw(scores, num_kept, source))
        draws = [draw(scores, num_kept, source) for _ in range(_NUM_DRAWS)]
        losses = [mixed.loss(_batch(judge, step, size), kept) for kept in draws]
        scores = rewarded(scores, draws, losses)
    kept = highest(scores, num_kept)
    for step in range(how.steps // 2, how.steps):
        mixed.train(_batch(learn, step, size), kept)
    return Replacement(scores=scores, harmonizers=mixed.parameters_beside(kept))


def _batch(rows: Sequence[Mapping[str, Tensor]], step: int, size: int) -> Batch:
    """Return the rows of a step; behind the last comes the first."""
    places = range(step * size, (step + 1) * size)
    return collate([rows[place % len(rows)] for place in places], torch.device("cpu"))


class _Slot(StandIn):
    """The place of a block: itself, or its harmonizer."""

    attributes_of = "block"

    def __init__(self, block: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.harmonizer = other
        self.replaced = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the one of the two does that is in place."""
        own = self.harmonizer if self.replaced else self.block
        return own(hidden_states, *args, **kwargs)


class MixedModel:
    """The full model in memory, frozen, with a harmonizer beside each block of the middle."""

    def __init__(self, full: FullModel, middle: Sequence[int], how: HarmonizerTraining) -> None:
        """Load the full model; draw the harmonizers, which change nothing yet.

        Raises:
            FamilyError: A harmonizer that is zero is no identity, or has no form.
            ConfigError: The rank is more than a block's inner width.
        """
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = load_model(full.path, dtype=torch.float32, device=self._device)
        self._model.requires_grad_(False)
        blocks = get_blocks(self._model, full.arch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(how.seed)
            self._slots = {i: _Slot(blocks[i], harmonizer(blocks[i], how.rank)) for i in middle}
        places = [self._slots.get(i, block) for i, block in enumerate(blocks)]
        set_blocks(self._model, full.arch, nn.ModuleList(places))
        own = [p for slot in self._slots.values() for p in slot.harmonizer.parameters()]
        self._optimizer = torch.optim.AdamW(own, lr=_LEARNING_RATE, weight_decay=0.0)
        self._parameters = own
        self._check_identity(full.config.model_type)

    def train(self, batch: Batch, kept: Collection[int]) -> None:
        """Take a step of the harmonizers that stand beside some kept blocks.

        Args:
            batch: Rows of text.
            kept: Absolute indices.
        """
        self._optimizer.zero_grad()
        with torch.enable_grad():
            loss = self._mean_loss(batch, kept)
            torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()

    @torch.no_grad()
    def loss(self, batch: Batch, kept: Collection[int]) -> float:
        """Return the mean cross-entropy of the next token, in nats, beside some kept blocks."""
        return float(self._mean_loss(batch, kept))

    def parameters_beside(self, kept: Collection[int]) -> dict[int, dict[str, Tensor]]:
        """Return the parameters of every other block's harmonizer, by path in the block."""
        return {
            index: {n: p.detach().cpu() for n, p in slot.harmonizer.named_parameters()}
            for index, slot in self._slots.items()
            if index not in kept
        }

    def _mean_loss(self, batch: Batch, kept: Collection[int]) -> Tensor:
        for index, slot in self._slots.items():
            slot.replaced = index not in kept
        logits = self._model(**inputs_of(batch, self._device), use_cache=False).logits
        labels = batch["labels"].to(self._device)
        return sum_cross_entropy(logits, labels) / targets_in([batch])

    def _check_identity(self, model_type: str) -> None:
        changed: list[bool] = []

        def see(_slot: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            changed.append(not torch.equal(args[0], after))

        handles = [slot.register_forward_hook(see) for slot in self._slots.values()]
        tokens = torch.arange(1, 5)[None]
        self.loss({"input_ids": tokens, "labels": tokens}, ())
        for handle in handles:
            handle.remove()
        if any(changed):
            raise FamilyError(
                f"a block of this {model_type} changes what it is given even where attention and "
                "feed-forward are zero (its norms are behind them), so no harmonizer has its form; "
                "select by another method"
            )
