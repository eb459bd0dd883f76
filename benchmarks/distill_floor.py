# SPDX-License-Identifier: Apache-2.0
"""The least arithmetic of a distillation step, as ``distill`` does it and plainly.

Counted as in :mod:`benchmarks.floor`: a matrix of ``W`` weights costs ``2 W`` operations for each
token forward, ``2 W`` for the gradient of its input and ``2 W`` for its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offsite_ray.split import parse_plan

if TYPE_CHECKING:
    from benchmarks.models import Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """How often a step runs what: counts of blocks, and of the head."""

    forward_blocks: int
    forward_heads: int
    input_blocks: int
    """Blocks that give the gradient of their input."""
    input_heads: int
    weight_blocks: int
    """Blocks that give the gradient of their weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillFlops:
    """Floating-point operations of one step."""

    matrices: int
    attention: int
    """Queries with keys and weights with values, forward and backward."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.attention


def runs(shape: Shape, *, way: str, loss: str) -> Runs:
    """Return what a step runs at least.

    Args:
        shape: The full model and its plan.
        way: ``shared`` runs the blocks that both have once, and nothing that no loss needs;
            ``plain`` runs both models whole.
        loss: ``hidden`` ends with the emulator; ``logits`` needs the head of both; any other has
            a loss of the student's own logits.
    """
    plan = parse_plan(shape.plan, shape.num_blocks, lambda middle, count: middle[:count])
    own, top = len(plan.emulator), plan.num_blocks - 1 - max(plan.middle)
    bottom = len(plan.adapter) - top
    through_head = loss != "hidden"
    if way == "plain":
        blocks, heads = plan.num_blocks + len(plan.kept), 2
    else:
        tops = {"hidden": 0, "logits": 2}.get(loss, 1)
        blocks, heads = bottom + len(plan.middle) + own + tops * top, tops
    return Runs(
        forward_blocks=blocks,
        forward_heads=heads,
        input_blocks=own + (top if through_head else 0),
        input_heads=1 if through_head else 0,
        weight_blocks=own,
    )


def distill_flops(
    shape: Shape, num_tokens: int, batch_size: int = 1, *, way: str, loss: str
) -> DistillFlops:
    """Return the operations of a step on sequences of ``num_tokens``."""
    of = runs(shape, way=way, loss=loss)
    block = sum(rows * columns for rows, columns in shape.linears)
    head = shape.vocab * shape.width
    blocks = of.forward_blocks + of.input_blocks + of.weight_blocks
    matrices = blocks * block + (of.forward_heads + of.input_heads) * head
    # A token with those up to itself, (T + 1) / 2 on average; twice that in the backward pass.
    pairs = shape.width * (num_tokens + 1)
    scale = 2 * num_tokens * batch_size
    return DistillFlops(
        matrices=scale * matrices,
        attention=scale * pairs * (of.forward_blocks + 2 * of.input_blocks),
    )
