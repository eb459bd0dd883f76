# SPDX-License-Identifier: Apache-2.0
"""What happens at which step: learning rate, data order, evaluations, checkpoints."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from offsite_ray.config import TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """What happens at which step; plain numbers, the same on every worker."""

    total_steps: int
    warmup_steps: int
    eval_every: int
    checkpoint_every: int
    batch_size: int
    num_rows: int
    seed: int
    peak_learning_rate: float
    scores_checkpoints: bool
    """Whether every checkpoint is evaluated, so that the best can be told."""

    def learning_rate(self, step: int) -> float:
        """Return the rate of step 0, 1, ...: linear warm-up, then a cosine to zero."""
        if step < self.warmup_steps:
            return self.peak_learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak_learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def rows(self, step: int, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return a worker's rows of the global batch of a step; epochs differ in their order."""
        first = step * self.batch_size
        places = range(first + rank, first + self.batch_size, world_size)
        epochs = {place // self.num_rows for place in places}
        orders = {epoch: _order(self.seed, epoch, self.num_rows) for epoch in epochs}
        return [int(orders[p // self.num_rows][p % self.num_rows]) for p in places]

    def evaluates(self, done: int) -> bool:
        """Return whether there is an evaluation when ``done`` steps are."""
        scored = self.scores_checkpoints and self.checkpoints(done)
        return scored or done % self.eval_every == 0 or done == self.total_steps

    def checkpoints(self, done: int) -> bool:
        """Return whether there is a checkpoint when ``done`` steps are."""
        return done % self.checkpoint_every == 0 and done < self.total_steps


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_rows, generator=generator)


def schedule(config: TrainingConfig, num_rows: int) -> Schedule:
    """Return the schedule of a run over ``num_rows`` sequences."""
    steps = config.max_steps or max(1, math.ceil(config.epochs * num_rows / config.batch_size))
    return Schedule(
        total_steps=steps,
        warmup_steps=min(steps, round(config.warmup_fraction * steps)),
        eval_every=config.eval_every or max(1, steps // 10),
        checkpoint_every=config.checkpoint_every or max(1, steps // 4),
        batch_size=config.batch_size,
        num_rows=num_rows,
        seed=config.seed,
        peak_learning_rate=config.learning_rate,
        scores_checkpoints=config.keep_best > 0 or config.result == "best",
    )
