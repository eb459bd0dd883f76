# SPDX-License-Identifier: Apache-2.0
"""Teacher and emulator in one forward pass of a stock model.

The model's block list is replaced by slots. Below the middle nothing changes: teacher and emulator
share embeddings and bottom adapter blocks, which run once. A slot of the middle runs the teacher's
block on the teacher's hidden states, without gradient, and the emulator's block (if the plan keeps
it) on the emulator's. Above, an adapter block runs for whichever of the two is still needed. So
masks, rotary embeddings and norms are transformers' own, whatever the family.

The teacher's blocks may be missing: where no loss needs them, and where their output is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offsite_ray.architectures import StandIn
from offsite_ray.distillation.losses import DistillationLoss, last_stood_for, normalized_error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offsite_ray.split import SplitPlan

DRIFT = "drift/"
"""Before the index of an emulator block: its error, which is only measured in evaluations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The emulator's hidden states against the teacher's, behind one block."""

    part: str
    """Part of the loss that it counts to."""
    end: int
    """Block of the full model whose output is the target."""
    share: float
    """Share of the part."""

    @property
    def trains(self) -> bool:
        """Whether it is part of the loss, not only of evaluations."""
        return not self.part.startswith(DRIFT)


class Stream:
    """What the slots of a forward pass hand on beside the emulator's hidden states."""

    def __init__(self) -> None:
        """Start without a teacher."""
        self.start({})

    def start(self, given: Mapping[int, Tensor]) -> None:
        """Begin a pass; ``given``: the teacher's output behind some blocks, ``(B, T, H)`` each."""
        self.given = given
        self.teacher: Tensor | None = None
        self.parts: dict[str, Tensor] = {}
        self._rest: tuple[Any, ...] | None = None

    def run(self, block: nn.Module, hidden: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Return a block's hidden states; what it returns beside them is kept for the model."""
        output = block(hidden, *args, **kwargs)
        self._rest = tuple(output[1:]) if isinstance(output, tuple) else None
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def run_teacher(self, block: nn.Module, hidden: Tensor, args: Any, kwargs: Any) -> None:
        """Advance the teacher by a block; it starts from the hidden states that both share."""
        with torch.no_grad():
            source = hidden.detach() if self.teacher is None else self.teacher
            self.teacher = self.run(block, source, args, kwargs)

    def compare(self, emulated: Tensor, comparisons: Sequence[Comparison]) -> None:
        """Add the errors of the emulator's hidden states to the parts."""
        for comparison in comparisons:
            if self.given:
                self.teacher = self.given.get(comparison.end, self.teacher)
            known = comparison.end in self.given or not self.given
            if not known or self.teacher is None:
                continue
            if comparison.trains or not torch.is_grad_enabled():
                error = normalized_error(emulated, self.teacher) * comparison.share
                before = self.parts.get(comparison.part)
                self.parts[comparison.part] = error if before is None else before + error

    def output(self, hidden: Tensor, *, join: bool) -> Any:
        """Return hidden states in the form of a block's output.

        Args:
            hidden: The emulator's.
            join: Whether the teacher's go behind them, as further rows of the batch, so that the
                model's last norm is applied to both.
        """
        if join and self.teacher is not None:
            hidden = torch.cat([hidden, self.teacher.to(hidden.dtype)])
        return hidden if self._rest is None else (hidden, *self._rest)


class _Slot(StandIn):
    """The place of a block."""

    def __init__(self, stream: Stream, *, join: bool) -> None:
        super().__init__()
        self._stream = stream
        self._join = join


class MiddleSlot(_Slot):
    """The place of a middle block: teacher's and emulator's side by side, or one of them."""

    def __init__(
        self,
        stream: Stream,
        teacher: nn.Module | None,
        emulator: nn.Module | None,
        comparisons: Sequence[Comparison],
        *,
        runs_teacher: bool,
        join: bool,
    ) -> None:
        """Take the blocks; ``join`` as :meth:`Stream.output`."""
        super().__init__(stream, join=join)
        self.teacher = teacher
        self.emulator = emulator
        self.attributes_of = "emulator" if teacher is None else "teacher"
        self._comparisons = tuple(comparisons)
        self._runs_teacher = runs_teacher

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the block would, with the emulator's hidden states ``(B, T, H)``."""
        stream = self._stream
        if self.teacher is not None and self._runs_teacher:
            stream.run_teacher(self.teacher, hidden_states, args, kwargs)
        emulated = hidden_states
        if self.emulator is not None:
            emulated = stream.run(self.emulator, hidden_states, args, kwargs)
        stream.compare(emulated, self._comparisons)
        return stream.output(emulated, join=self._join)


class AdapterSlot(_Slot):
    """The place of an adapter block above the middle's beginning: run for each, or for none."""

    attributes_of = "block"

    def __init__(
        self, stream: Stream, block: nn.Module, *, teacher: bool, emulator: bool, join: bool
    ) -> None:
        """Take the block, and for whom it runs."""
        super().__init__(stream, join=join)
        self.block = block
        self._teacher, self._emulator = teacher, emulator

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the block would, with the emulator's hidden states ``(B, T, H)``."""
        stream = self._stream
        if self._teacher:
            stream.run_teacher(self.block, hidden_states, args, kwargs)
        if self._emulator:
            hidden_states = stream.run(self.block, hidden_states, args, kwargs)
        return stream.output(hidden_states, join=self._join)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Who runs how far. Indices are absolute; -1: not at all."""

    teacher_until: int
    """Last block that the teacher runs."""
    emulator_until: int
    """Last block that the emulator model runs."""
    comparisons: Mapping[int, tuple[Comparison, ...]]
    """Block of the trunk to what is compared behind it."""


def layout(plan: SplitPlan, trunk: Sequence[int], losses: Mapping[str, DistillationLoss]) -> Layout:
    """Return who runs how far for some losses.

    Args:
        plan: Of the bundle.
        trunk: Absolute indices of the blocks that there are slots for: all, or the kept ones.
        losses: The parts that have a weight.
    """
    wanted = [(name, loss.ends(plan)) for name, loss in losses.items() if loss.ends is not None]
    drift = [(f"{DRIFT}{index}", (end,)) for index, end in last_stood_for(plan).items()]
    found: dict[int, list[Comparison]] = {}
    segment_of = {index: segment for segment in plan.segments for index in segment.blocks}
    for part, places in (*wanted, *drift):
        for end in places:
            here = segment_of[end].blocks
            at = max((i for i in trunk if i <= end and i in here), default=-1)
            comparison = Comparison(part=part, end=end, share=1 / len(places))
            found.setdefault(at, []).append(comparison)
    end = max((end for _, places in wanted for end in places), default=-1)
    last = plan.num_blocks - 1
    return Layout(
        teacher_until=last if any(loss.teacher_logits for loss in losses.values()) else end,
        emulator_until=last if any(loss.head for loss in losses.values()) else end,
        comparisons={at: tuple(each) for at, each in found.items()},
    )


def make_slots(
    plan: SplitPlan,
    trunk: Sequence[int],
    blocks: Sequence[nn.Module],
    emulator: Mapping[int, nn.Module],
    losses: Mapping[str, DistillationLoss],
    stream: Stream,
) -> list[nn.Module]:
    """Return what a trunk's blocks are replaced by.

    Args:
        plan: Of the bundle.
        trunk: Absolute index of each of ``blocks``.
        blocks: Of the full model (all of them), or of the emulator model: then there is no teacher.
        emulator: Absolute index to the emulator's block, for each that the plan keeps.
        losses: The parts that have a weight.
        stream: What the slots write to.
    """
    how = layout(plan, trunk, losses)
    first = min(plan.middle, default=plan.num_blocks)
    result: list[nn.Module] = []
    for index, block in zip(trunk, blocks, strict=True):
        teacher, join = index <= how.teacher_until, index == trunk[-1] <= how.teacher_until
        if index in plan.middle:
            own = emulator.get(index)
            slot: nn.Module = MiddleSlot(
                stream,
                None if block is own else block,
                own,
                how.comparisons.get(index, ()),
                runs_teacher=teacher,
                join=join,
            )
        elif index < first:
            slot = block
        else:
            runs = index <= how.emulator_until
            slot = AdapterSlot(stream, block, teacher=teacher, emulator=runs, join=join)
        result.append(slot)
    return result
