# SPDX-License-Identifier: Apache-2.0
"""What the training loop is given: a task, an engine, someone to report to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from offsite_ray.results import Report, TrainingHistory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from offsite_ray.config import TrainingConfig
    from offsite_ray.training.fragments import Fragment, Read

Batch = dict[str, "Tensor"]


class TokenDataset(Protocol):
    """Rows of equal length by index: ``input_ids``, ``labels``, ``position_ids``, each ``(T,)``."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        """Return a row."""
        ...


class TrainingTask(Protocol):
    """What is trained on what. Plain values only: it is shipped to workers."""

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Part of the loss to its weight."""
        ...

    @property
    def loss_units(self) -> Mapping[str, Literal["token", "sequence"]]:
        """Part of the loss to what its sum is divided by."""
        ...

    @property
    def flops_per_token(self) -> float | None:
        """Operations of a training step for each token, without recomputation, if known."""
        ...

    def build(self, device: torch.device) -> nn.Module:
        """Return the module; ``forward(**batch)`` gives each part of the loss, summed.

        Without gradients it may give more parts: errors to be reported, summed over sequences.
        """
        ...

    def datasets(self) -> tuple[TokenDataset, TokenDataset]:
        """Return the rows to train on and the held-out ones."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return what a checkpoint must agree on to be resumed."""
        ...


class Engine(Protocol):
    """What the loop needs of a training runtime."""

    rank: int
    world_size: int
    device: torch.device
    copies: bool
    """Whether :meth:`fragments` are copies, which training does not change."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the parts of the loss, summed over the batch."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a share of the global loss."""
        ...

    def step(self, learning_rate: float) -> float | None:
        """Reduce, clip and apply the gradient; return its norm before clipping, if known."""
        ...

    def reduce(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all workers."""
        ...

    def fragments(self) -> list[Fragment]:
        """Return this worker's part of everything that training goes on from."""
        ...

    def restore(self, read: Read, steps: int) -> None:
        """Go on from fragments, whoever wrote them, with ``steps`` done."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOutcome:
    """What a run ends with."""

    history: TrainingHistory
    state: Mapping[str, Tensor]
    """Trained parameters by their name in the task's module: float32, on the CPU."""


Fit = Callable[["TrainingTask", "TrainingConfig", Path, Report], TrainingOutcome]
"""Runs a task: :func:`run_here`, or on Ray."""
