# SPDX-License-Identifier: Apache-2.0
"""Distillation: train the emulator blocks to stand in for the middle of the full model.

One forward pass of the stock model does everything. Its block list is replaced by slots: an adapter
block runs as it is; a slot of the middle runs the teacher's block on the teacher's hidden states,
without gradient, and the emulator's block (if the plan keeps it) on the emulator's. Both start
from the same hidden states at the beginning of each run of middle blocks. So masks, rotary
embeddings and the head are transformers' own, whatever the family.

Source: Xiao et al., arXiv 2302.04870, section 3.2 and appendix; the loss of the authors' code, 30 x
RMS-normalised mean squared error + 1 x language modelling. The RMS is taken over each sequence of
the teacher's output instead of over the batch, so that the loss does not depend on how a batch is
cut into micro-batches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from offsite_ray.architectures import (
    DTYPES,
    Architecture,
    Notice,
    disk_state,
    get_blocks,
    load_config,
    load_model,
    resolve_architecture,
    set_blocks,
)
from offsite_ray.bundle import check_free
from offsite_ray.data import PreparedData, TokenBlocks, split_blocks
from offsite_ray.emulator import (
    EmulatorBundle,
    blocks_path,
    check_fits,
    open_bundle,
    open_full_model,
    write_distilled,
)
from offsite_ray.errors import ConfigError
from offsite_ray.results import TrainingHistory, recipe_of
from offsite_ray.training import (
    LANGUAGE_MODEL,
    Fit,
    LanguageModelLoss,
    Report,
    enable_checkpointing,
    keeps_documents_apart,
    run_directory,
    set_dtypes,
)
from offsite_ray.training.sources import prepared_for

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


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationLoss:
    """A part of the loss."""

    weight: Callable[[DistillConfig], float]
    unit: Literal["token", "sequence"]
    """What its sum is divided by."""
    hidden: Callable[[Tensor, Tensor], Tensor] | None
    """``(emulated, target) -> sum`` of the middle's output; None: the model's own loss ``lm``."""


DISTILLATION_LOSSES: dict[str, DistillationLoss] = {
    "hidden": DistillationLoss(
        weight=lambda config: config.hidden_weight, unit="sequence", hidden=normalized_error
    ),
    "lm": DistillationLoss(weight=lambda config: config.lm_weight, unit="token", hidden=None),
}
"""Every part of the loss by its name."""


class Stream:
    """What the slots of a forward pass hand on beside the emulator's hidden states."""

    def __init__(self) -> None:
        """Start without a teacher."""
        self.teacher: Tensor | None = None
        self.losses: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.teacher, self.losses = None, {}


class MiddleSlot(nn.Module):
    """The place of a middle block: teacher's and emulator's side by side."""

    def __init__(
        self,
        teacher: nn.Module,
        emulator: nn.Module | None,
        stream: Stream,
        *,
        first: bool,
        last: bool,
        num_segments: int,
    ) -> None:
        """Take both blocks; ``first`` and ``last`` of their run of middle blocks."""
        super().__init__()
        self.teacher = teacher
        self.emulator = emulator
        self._stream = stream
        self._first, self._last = first, last
        self._share = 1.0 / num_segments

    def __getattr__(self, name: str) -> Any:
        """Give what a model asks of its block (e.g. its attention type) from the teacher's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("teacher"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the block would, with the emulator's hidden states ``(B, T, H)``."""
        stream = self._stream
        if self._first or stream.teacher is None:
            stream.teacher = hidden_states.detach()
        with torch.no_grad():
            output = self.teacher(stream.teacher, *args, **kwargs)
        stream.teacher = output[0] if isinstance(output, tuple) else output
        emulated = hidden_states
        if self.emulator is not None:
            result = self.emulator(hidden_states, *args, **kwargs)
            emulated = result[0] if isinstance(result, tuple) else result
        if self._last:
            self._compare(emulated, stream.teacher)
        return (emulated, *output[1:]) if isinstance(output, tuple) else emulated

    def _compare(self, emulated: Tensor, target: Tensor) -> None:
        for name, loss in DISTILLATION_LOSSES.items():
            if loss.hidden is not None:
                part = loss.hidden(emulated, target) * self._share
                self._stream.losses[name] = self._stream.losses.get(name, 0.0) + part


class DistillationModel(LanguageModelLoss):
    """The full model with slots in its middle; returns every part of the loss."""

    def __init__(self, language_model: Any, stream: Stream, *, use_positions: bool) -> None:
        """Take a model whose slots write to ``stream``."""
        super().__init__(language_model, use_positions=use_positions)
        self._stream = stream

    def forward(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the parts of the loss, summed over ``(B, T)``."""
        self._stream.clear()
        parts = super().forward(input_ids, labels, position_ids)
        parts |= self._stream.losses
        self._stream.clear()
        return parts


def install_slots(
    model: Any, arch: Architecture, plan: SplitPlan, emulator_blocks: Mapping[int, nn.Module]
) -> Stream:
    """Replace a full model's middle by slots; return what they write to.

    Args:
        model: The full model in memory; changed.
        arch: Its architecture.
        plan: Which blocks are in the middle.
        emulator_blocks: Absolute index to the emulator's block, for each that the plan keeps.
    """
    stream = Stream()
    blocks = list(get_blocks(model, arch))
    for segment in plan.segments:
        for index in segment.blocks:
            blocks[index] = MiddleSlot(
                blocks[index],
                emulator_blocks.get(index),
                stream,
                first=index == segment.blocks[0],
                last=index == segment.blocks[-1],
                num_segments=len(plan.segments),
            )
    set_blocks(model, arch, nn.ModuleList(blocks))
    return stream


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillTask:
    """An emulator in the middle of its full model. Plain values: it is shipped to workers."""

    model: str
    bundle: str
    bundle_id: str
    plan: SplitPlan
    blocks: str | None
    config: DistillConfig
    data: PreparedData
    use_positions: bool

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Part of the loss to its weight."""
        return {name: loss.weight(self.config) for name, loss in DISTILLATION_LOSSES.items()}

    @property
    def loss_units(self) -> Mapping[str, Literal["token", "sequence"]]:
        """Part of the loss to what its sum is divided by."""
        return {name: loss.unit for name, loss in DISTILLATION_LOSSES.items()}

    def build(self, device: torch.device) -> nn.Module:
        """Return the full model with the emulator's blocks beside its middle."""
        compute = DTYPES[self.config.dtype]
        stored = None if compute is torch.bfloat16 else compute
        model = load_model(self.model, dtype=stored, dropout=False)
        arch = resolve_architecture(load_config(self.model), self.blocks)
        emulator = load_model(self.bundle, dtype=stored, dropout=False)
        own = get_blocks(emulator, resolve_architecture(load_config(self.bundle), self.blocks))
        kept = {index: own[self.plan.kept.index(index)] for index in self.plan.emulator}
        model.requires_grad_(False)
        for block in kept.values():
            block.requires_grad_(True)
        if self.config.gradient_checkpointing:
            enable_checkpointing(model)
            enable_checkpointing(emulator)
        stream = install_slots(model, arch, self.plan, kept)
        module = DistillationModel(model, stream, use_positions=self.use_positions)
        set_dtypes(module, compute)
        return module.to(device)

    def datasets(self) -> tuple[TokenBlocks, TokenBlocks]:
        """Return the rows to train on and the held-out ones."""
        return split_blocks(self.data.path, self.config.eval_fraction, self.config.seed)

    def fingerprint(self) -> dict[str, Any]:
        """Return what a checkpoint must agree on to be resumed."""
        return {
            "bundle": self.bundle_id,
            "data": self.data.digest,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillResult:
    """What ``distill`` made."""

    out: str
    id: str
    first_losses: Mapping[str, float]
    """Held-out losses before the first step, by part; ``loss`` is their weighted sum."""
    last_losses: Mapping[str, float]
    history: TrainingHistory
    seconds: float


def distill(
    config: DistillConfig, fit: Fit, report: Report, notice: Notice | None = None
) -> DistillResult:
    """Train the emulator blocks of a bundle against its full model; write the bundle again.

    Args:
        config: What to train, on what, how.
        fit: Runs the training: on Ray, or in this process.
        report: Told of each step and evaluation.
        notice: Told what is unusual but not wrong.

    Raises:
        OffsiteError: Model, bundle or data cannot be used; nothing is left behind.
    """
    start = time.perf_counter()
    out = Path(config.out)
    check_free(out)
    bundle = open_bundle(config.bundle)
    if not bundle.plan.emulator:
        raise ConfigError(
            f"{config.bundle} keeps no emulator block ({bundle.plan.short}), so there is nothing "
            "to distil; compress with a plan that keeps one"
        )
    full = open_full_model(config.model, blocks_path(bundle.manifest))
    check_fits(bundle.path, bundle.manifest, full)
    apart = keeps_documents_apart(full.config, full.arch, full.weights)
    with run_directory(out, config.resume) as run_dir:
        task = DistillTask(
            model=str(full.path.resolve()),
            bundle=str(bundle.path.resolve()),
            bundle_id=bundle.manifest.id,
            plan=bundle.plan,
            blocks=blocks_path(bundle.manifest),
            config=config,
            data=prepared_for(config.data, full.path, full.config, config.seq_len, run_dir, notice),
            use_positions=apart,
        )
        outcome = fit(task, config, run_dir, report)
        history = outcome.history
        recipe = recipe_of(config, data=task.data.digest, losses=list(DISTILLATION_LOSSES))
        measured = {
            "distillation_seconds": history.seconds,
            "distillation_peak_memory_bytes": history.peak_memory_bytes,
            "distillation_losses": dict(history.evaluations[-1].losses),
        }
        tensors = _bundle_state(bundle, task.plan, outcome.state)
        manifest = write_distilled(bundle, tensors, out, recipe, measured)
    return DistillResult(
        out=config.out,
        id=manifest.id,
        first_losses=history.evaluations[0].losses,
        last_losses=history.evaluations[-1].losses,
        history=history,
        seconds=time.perf_counter() - start,
    )


def _bundle_state(
    bundle: EmulatorBundle, plan: SplitPlan, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return trained tensors, named as in the slots, by their name on disk in the bundle."""
    own = {}
    for name, tensor in state.items():
        inner = name.removeprefix(LANGUAGE_MODEL)
        index = bundle.arch.block_of(inner)
        if index is not None:
            renamed = bundle.arch.rename(inner, plan.kept.index(index))
            own[renamed.replace(".emulator.", ".", 1)] = tensor
    return disk_state(bundle.config, bundle.arch, own, bundle.weights.tensors)
