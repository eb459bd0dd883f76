# SPDX-License-Identifier: Apache-2.0
"""The floor: the least arithmetic and the least memory of a training step, counted by hand.

A matrix of ``W`` weights costs ``2 W`` floating-point operations for each token in the forward
pass, ``2 W`` for the gradient of its input and ``2 W`` for its own; the last only where it is
trained, the one before only where something below it is. Attention multiplies every query with the
keys up to its own. Embedding look-ups, norms, activations and the optimizer count as nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offsite_ray.split import parse_plan

if TYPE_CHECKING:
    from benchmarks.models import Shape

_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What trains in a model that keeps some of a shape's blocks."""

    shape: Shape
    num_blocks: int
    """Blocks of the model that runs: all of the shape's, or those that a plan keeps."""
    trained: frozenset[int]
    """Blocks that train, as this model numbers them."""
    rank: int | None
    """Of LoRA on every matrix of these blocks; None: their own parameters train."""
    whole: bool
    """Whether embeddings (and with them the tied head) and the last norm train as well."""

    @property
    def num_trained(self) -> int:
        """Parameters that train."""
        shape = self.shape
        if self.rank is not None:
            return len(self.trained) * sum(self.rank * (i + o) for i, o in shape.linears)
        others = shape.other_parameters if self.whole else 0
        return len(self.trained) * shape.block_parameters + others

    @property
    def num_frozen(self) -> int:
        """Parameters that do not."""
        own = self.num_blocks * self.shape.block_parameters + self.shape.other_parameters
        return own if self.rank is not None else own - self.num_trained


def work_on_full_model(shape: Shape, rank: int | None) -> Work:
    """Return the work of fine-tuning everything, or of LoRA in every block."""
    blocks = frozenset(range(shape.num_blocks))
    return Work(
        shape=shape, num_blocks=shape.num_blocks, trained=blocks, rank=rank, whole=rank is None
    )


def work_on_bundle(shape: Shape, rank: int | None) -> Work:
    """Return the work of fine-tuning the adapter blocks of the shape's plan, or LoRA in them."""
    plan = parse_plan(shape.plan, shape.num_blocks, lambda middle, count: middle[:count])
    trained = frozenset(plan.kept.index(block) for block in plan.adapter)
    return Work(shape=shape, num_blocks=len(plan.kept), trained=trained, rank=rank, whole=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFlops:
    """Floating-point operations of one step."""

    forward: int
    """Of the matrices."""
    input_gradients: int
    weight_gradients: int
    attention: int
    """Queries with keys and weights with values, forward and backward."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.forward + self.input_gradients + self.weight_gradients + self.attention


def step_flops(work: Work, num_tokens: int, batch_size: int = 1) -> StepFlops:
    """Return the floating-point operations of a step on sequences of ``num_tokens``."""
    shape = work.shape
    num_first = len(shape.linears) - 3
    head = shape.vocab * shape.width
    lowest = min(work.trained)
    forward, inputs, weights = head, head, head if work.whole else 0
    for index in range(work.num_blocks):
        trains = index in work.trained
        # In the lowest trained block, what reads its input needs a gradient for the norm alone.
        above = work.whole or index > lowest or (trains and work.rank is None)
        for place, (rows, columns) in enumerate(shape.linears):
            needed = above or (place >= num_first and index >= lowest)
            forward += rows * columns
            inputs += rows * columns if needed else 0
            if trains and work.rank is None:
                weights += rows * columns
            elif trains and work.rank is not None:
                forward += work.rank * (rows + columns)
                inputs += work.rank * (columns + (rows if needed else 0))
                weights += work.rank * (rows + columns)
    # A token with those up to itself, (T + 1) / 2 on average; twice that in the backward pass.
    pairs = shape.width * (num_tokens + 1)
    passes = work.num_blocks + 2 * (work.num_blocks - lowest)
    scale = 2 * num_tokens * batch_size
    return StepFlops(
        forward=scale * forward,
        input_gradients=scale * inputs,
        weight_gradients=scale * weights,
        attention=scale * passes * pairs,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBytes:
    """Bytes that a step holds."""

    weights: int
    """What trains in float32, the rest in the dtype of the arithmetic."""
    gradients: int
    moments: int
    """The two of AdamW."""
    saved: int
    """What the backward pass reads, and the gradient of the logits that it starts from."""

    @property
    def total(self) -> int:
        """The larger of two moments: the backward pass begins, and the optimizer steps."""
        return self.weights + self.moments + max(self.gradients, self.saved)


def step_bytes(
    work: Work, num_tokens: int, batch_size: int = 1, *, itemsize: int = _FLOAT32
) -> StepBytes:
    """Return the bytes of a step on sequences of ``num_tokens``, without recomputation.

    Args:
        work: What trains.
        num_tokens: Tokens of a sequence.
        batch_size: Sequences of the batch.
        itemsize: Bytes of a frozen weight and of an activation: 4, or 2 in bf16.
    """
    shape = work.shape
    h = shape.width
    lowest = min(work.trained)
    # What two norms, attention and the activation function read; then what trained matrices read
    # beside it. GPT-2's activation function reads what OPT's need not keep.
    always = 2 * h + 4 * h + shape.ffn
    trained = 2 * h + (shape.ffn if shape.family == "gpt2" else 0)
    blocks = (work.num_blocks - lowest) * always + len(work.trained) * trained
    values = blocks + h + (h if work.whole else 0) + shape.vocab
    return StepBytes(
        weights=work.num_trained * _FLOAT32 + work.num_frozen * itemsize,
        gradients=work.num_trained * _FLOAT32,
        moments=2 * work.num_trained * _FLOAT32,
        saved=values * num_tokens * batch_size * itemsize,
    )
