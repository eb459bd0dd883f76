# SPDX-License-Identifier: Apache-2.0
"""The losses of distillation: a table, and the functions in it.

Sources: ``hidden`` and ``lm`` are those of Xiao et al., arXiv 2302.04870, section 3.2 and appendix,
in the authors' code 30 x RMS-normalised mean squared error + 1 x language modelling; ``layerwise``
is FitNets' idea (Romero et al., arXiv 1412.6550) at every emulator block; ``logits`` is Hinton et
al., arXiv 1503.02531. The RMS is taken over each sequence of the teacher's output instead of over
the batch, so that the loss does not depend on how a batch is cut into micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

from offsite_ray.data import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from offsite_ray.config import DistillConfig
    from offsite_ray.split import SplitPlan


def normalized_error(emulated: Tensor, target: Tensor) -> Tensor:
    """Return the squared error of hidden states over the target's power, summed over sequences.

    Args:
        emulated: ``(B, T, H)``, the emulator's output.
        target: ``(B, T, H)``, the teacher's, without gradient.

    Returns:
        ``sum_b mean((emulated_b - target_b)^2) / mean(target_b^2)``, 0-d float32.
    """
    emulated, target = emulated.float(), target.float()
    error = (emulated - target).square().mean(dim=(1, 2))
    power = target.square().mean(dim=(1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
    return (error / power).sum()


def cross_entropy(logits: Tensor, _teacher: Tensor | None, targets: Tensor, _t: float) -> Tensor:
    """Return the summed negative log-likelihood of targets ``(N,)`` under logits ``(N, V)``."""
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def forward_divergence(
    logits: Tensor, teacher: Tensor | None, targets: Tensor, temperature: float
) -> Tensor:
    """Return ``T^2 KL(teacher || student)`` at temperature ``T``, summed over predicted tokens.

    Args:
        logits: The student's, ``(N, V)``.
        teacher: The teacher's, ``(N, V)``, without gradient.
        targets: ``(N,)``; positions with -100 do not count.
        temperature: ``T``; the factor ``T^2`` keeps the gradient's size.
    """
    if teacher is None:
        raise ValueError("the divergence from a teacher needs the teacher's logits")
    student = functional.log_softmax(logits / temperature, dim=-1)
    expected = functional.log_softmax(teacher / temperature, dim=-1)
    each = functional.kl_div(student, expected, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (each * (targets != IGNORED)).sum()


def last_stood_for(plan: SplitPlan) -> dict[int, int]:
    """Return for each emulator block the last block of the full model that it stands for.

    That is the one before the next emulator block, or the end of its run of middle blocks.
    """
    found: dict[int, int] = {}
    for segment in plan.segments:
        ends = [index - 1 for index in segment.kept[1:]] + [segment.blocks[-1]]
        found.update(zip(segment.kept, ends, strict=False))
    return found


def _segment_ends(plan: SplitPlan) -> tuple[int, ...]:
    return tuple(segment.blocks[-1] for segment in plan.segments)


def _block_ends(plan: SplitPlan) -> tuple[int, ...]:
    return tuple(last_stood_for(plan).values())


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationLoss:
    """A part of the loss: of hidden states (``ends``) or of logits (``head``)."""

    weight: Callable[[DistillConfig], float]
    unit: Literal["token", "sequence"]
    """What its sum is divided by."""
    ends: Callable[[SplitPlan], tuple[int, ...]] | None = None
    """Middle blocks after which the emulator's hidden states are compared with the teacher's."""
    head: Callable[[Tensor, Tensor | None, Tensor, float], Tensor] | None = None
    """``(logits, teacher's, targets, temperature) -> sum``."""
    teacher_logits: bool = False
    """Whether ``head`` needs the teacher's logits."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's middle has to be known."""
        return self.ends is not None or self.teacher_logits


DISTILLATION_LOSSES: dict[str, DistillationLoss] = {
    "hidden": DistillationLoss(
        weight=lambda config: config.hidden_weight, unit="sequence", ends=_segment_ends
    ),
    "layerwise": DistillationLoss(
        weight=lambda config: config.layerwise_weight, unit="sequence", ends=_block_ends
    ),
    "logits": DistillationLoss(
        weight=lambda config: config.logits_weight,
        unit="token",
        head=forward_divergence,
        teacher_logits=True,
    ),
    "lm": DistillationLoss(
        weight=lambda config: config.lm_weight, unit="token", head=cross_entropy
    ),
}
"""Every part of the loss by its name."""


def active_losses(config: DistillConfig) -> Mapping[str, DistillationLoss]:
    """Return the parts that have a weight; the others are not computed."""
    return {name: loss for name, loss in DISTILLATION_LOSSES.items() if loss.weight(config)}
