# SPDX-License-Identifier: Apache-2.0
"""Rows to batches, and the loss of a language model on one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from offsite_ray.data import IGNORED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from offsite_ray.training.protocols import Batch


def collate(rows: Sequence[Mapping[str, Tensor]], device: torch.device) -> Batch:
    """Return rows as one batch ``(B, T)``, without positions where no document begins inside."""
    batch = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
    positions = batch.get("position_ids")
    if positions is not None and bool((positions[:, 1:] > positions[:, :-1]).all()):
        # One document to a row: plain causal attention, for which models have faster kernels.
        del batch["position_ids"]
    return batch


def num_targets(rows: Sequence[Mapping[str, Tensor]]) -> int:
    """Return how many tokens are to be predicted in some rows."""
    return sum(int((row["labels"][1:] != IGNORED).sum()) for row in rows)


def sum_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed negative log-likelihood of the labels, in float32.

    Args:
        logits: ``(B, T, V)`` of the model.
        labels: ``(B, T)``, not shifted; -100 where nothing is to be predicted.
    """
    wanted = labels[:, 1:] != IGNORED
    chosen = logits[:, :-1][wanted]
    return functional.cross_entropy(chosen.float(), labels[:, 1:][wanted], reduction="sum")
