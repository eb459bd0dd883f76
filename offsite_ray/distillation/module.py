# SPDX-License-Identifier: Apache-2.0
"""The module that is trained: from models in memory to a forward pass that gives the losses."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from offsite_ray.architectures import Architecture, get_blocks, set_blocks
from offsite_ray.distillation.losses import active_losses
from offsite_ray.distillation.slots import Stream, make_slots
from offsite_ray.training import enable_checkpointing
from offsite_ray.training.head import Head, head_losses, next_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offsite_ray.config import DistillConfig
    from offsite_ray.distillation.losses import DistillationLoss
    from offsite_ray.split import SplitPlan

TEACHER = "teacher_"
"""Before the index of a block: the teacher's output behind it, as a column of a batch."""


class DistillationModel(nn.Module):
    """A language model with slots for blocks; returns every part of the loss.

    The head runs only where a loss is of logits, and then on a piece of the tokens at a time.
    """

    def __init__(
        self,
        language_model: Any,
        stream: Stream,
        losses: Mapping[str, DistillationLoss],
        *,
        temperature: float,
        use_positions: bool,
    ) -> None:
        """Take a model whose slots write to ``stream``."""
        super().__init__()
        self.language_model = language_model
        self._stream = stream
        self._use_positions = use_positions
        self._of_logits = {
            name: partial(_at, loss.head, temperature) for name, loss in losses.items() if loss.head
        }
        self._joined = any(loss.teacher_logits for loss in losses.values())
        self._head = Head(language_model) if self._of_logits else None

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        **teacher: Tensor,
    ) -> dict[str, Tensor]:
        """Return the parts of the loss, summed over ``(B, T)``.

        Args:
            input_ids: ``(B, T)``.
            labels: ``(B, T)``, not shifted; -100 where nothing is to be predicted.
            position_ids: ``(B, T)``, or None.
            **teacher: ``teacher_17``: the teacher's output ``(B, T, H)`` behind block 17, where it
                is known.
        """
        self._stream.start({int(n.removeprefix(TEACHER)): t for n, t in teacher.items()})
        positions = {}
        if self._use_positions and position_ids is not None:
            positions["position_ids"] = position_ids
        output = self.language_model.base_model(input_ids=input_ids, use_cache=False, **positions)
        parts = self._stream.parts
        self._stream.start({})
        if self._head is not None:
            hidden, other = output.last_hidden_state, None
            if self._joined:
                hidden, other = hidden.chunk(2)
            targets = next_tokens(labels)
            parts |= head_losses(self._head, hidden, other, targets, self._of_logits)
        return parts


def _at(
    loss: Any, temperature: float, logits: Tensor, teacher: Tensor | None, targets: Tensor
) -> Any:
    return loss(logits, teacher, targets, temperature)


def distillation_module(
    full: Any | None,
    emulator: Any,
    arch: Architecture,
    plan: SplitPlan,
    config: DistillConfig,
    *,
    use_positions: bool,
) -> DistillationModel:
    """Return what is trained, from models of transformers on any device, ``meta`` among them.

    Args:
        full: The full model, whose middle is the teacher; None where no teacher runs. Changed.
        emulator: The emulator model, whose emulator blocks train. Changed.
        arch: Of either.
        plan: Which blocks of the full model those of the emulator model are.
        config: The losses' weights, recomputation and compilation.
        use_positions: As :func:`~offsite_ray.training.keeps_documents_apart` says.
    """
    own = get_blocks(emulator, arch)
    kept = {index: own[plan.kept.index(index)] for index in plan.emulator}
    trunk_model = emulator if full is None else full
    trunk = plan.kept if full is None else range(plan.num_blocks)
    for model in (emulator, full):
        if model is not None:
            model.requires_grad_(False)
            if config.gradient_checkpointing:
                enable_checkpointing(model)
    for block in kept.values():
        block.requires_grad_(True)
    if config.compile:
        for block in (*get_blocks(trunk_model, arch), *kept.values()):
            block.compile()
    losses, stream = active_losses(config), Stream()
    slots = make_slots(plan, trunk, list(get_blocks(trunk_model, arch)), kept, losses, stream)
    set_blocks(trunk_model, arch, nn.ModuleList(slots))
    return DistillationModel(
        trunk_model,
        stream,
        losses,
        temperature=config.temperature,
        use_positions=use_positions,
    )
