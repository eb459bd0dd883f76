# SPDX-License-Identifier: Apache-2.0
"""Rows to batches, and the loss of a language model on one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from offsite_ray.data import IGNORED
from offsite_ray.training.devices import device_type
from offsite_ray.training.head import next_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from offsite_ray.training.protocols import Batch

_CPU_PIECE = 2**20
"""Logits that the loss copies to float32 at once: few enough to stay in a core's cache."""
_GPU_PIECE = 2**24
"""The same on a GPU: enough that starting kernels takes no time worth mentioning."""


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

    The logits are the largest tensor of a step, so nothing of their size is made beside them: the
    arithmetic is done in float32 on a few rows at a time, and the backward pass writes the gradient
    over them. Autograd refuses where something else still needs them. Logits that no operation
    made are the caller's own and are left as they are.

    Args:
        logits: ``(B, T, V)`` of the model; overwritten by the backward pass.
        labels: ``(B, T)``, not shifted; -100 where nothing is to be predicted.
    """
    loss: Tensor = _SumCrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return loss


class _SumCrossEntropy(torch.autograd.Function):
    """Cross-entropy; its gradient is the softmax, less 1 at the target."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        targets = next_tokens(labels).flatten()
        loss = logits.new_zeros((), dtype=torch.float32)
        for piece, wanted in _pieces(logits.flatten(0, 1), targets):
            loss += functional.cross_entropy(
                piece.float(), wanted, ignore_index=IGNORED, reduction="sum"
            )
        ctx.save_for_backward(logits, targets)
        ctx.overwrite = not logits.is_leaf
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        result = logits.detach() if ctx.overwrite else logits.detach().clone()
        result = result.flatten(0, 1)
        for piece, wanted in _pieces(result, targets):
            values = piece.float().softmax(1)
            one = values.new_ones(len(wanted), 1)
            values.scatter_add_(1, wanted.clamp(min=0)[:, None], -one)
            piece.copy_(values.mul_((grad * (wanted != IGNORED))[:, None]))
        return result.view_as(logits), None


def _pieces(flat: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    elements = _CPU_PIECE if device_type(flat) == "cpu" else _GPU_PIECE
    rows = max(1, elements // flat.shape[1])
    return zip(torch.split(flat, rows), torch.split(targets, rows), strict=True)
