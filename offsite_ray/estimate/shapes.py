# SPDX-License-Identifier: Apache-2.0
"""A model and its plan without weights, and the steps that are rehearsed on them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.architectures import (
    DTYPES,
    Architecture,
    Notice,
    check_separable,
    drop_dropout,
    empty_model,
    kept_config,
    load_config,
    resolve_architecture,
)
from offsite_ray.distillation import distillation_module
from offsite_ray.distillation.cache import needed_ends
from offsite_ray.distillation.module import TEACHER
from offsite_ray.finetuning import finetuning_module
from offsite_ray.rehearsal import Rehearsal, empty_batch, rehearse
from offsite_ray.selection import SELECTION_METHODS, selection_method
from offsite_ray.split import parse_plan
from offsite_ray.storage import model_at
from offsite_ray.training import set_dtypes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn
    from transformers.configuration_utils import PretrainedConfig

    from offsite_ray.config import ComputeDtype, DistillConfig, FinetuneConfig
    from offsite_ray.split import SplitPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The size and form of one forward and backward pass of a worker."""

    batch_size: int
    seq_len: int
    packed: bool = False
    """Rows hold several documents, which attention keeps apart."""
    replicated: bool = True
    """Float32 masters and autocast, as in one process; else everything in the compute dtype."""
    gpu: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """A full model and a split plan: names and shapes."""

    config: PretrainedConfig
    arch: Architecture
    plan: SplitPlan

    @property
    def stored_dtype(self) -> torch.dtype:
        """What the full model's config says that its weights are stored in."""
        dtype = self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    @property
    def emulator_config(self) -> Any:
        """Config of the emulator model."""
        return kept_config(self.config, self.arch, self.plan.kept)

    @property
    def adapter_positions(self) -> tuple[int, ...]:
        """The adapter blocks, as the emulator model numbers them."""
        return tuple(self.plan.kept.index(index) for index in self.plan.adapter)

    def empty(self, config: PretrainedConfig | None = None) -> Any:
        """Return the full model (or the one of a config) on ``meta``, in evaluation mode."""
        return empty_model(config or self.config, self.arch.family.auto_class).eval()

    def rehearse_distillation(self, config: DistillConfig, step: Step) -> Rehearsal:
        """Return what a step of distillation takes."""
        ends = needed_ends(self.plan, config)
        cached = config.teacher_cache is not None
        full = self.empty() if ends and not cached else None
        emulator = self.empty(self.emulator_config)
        module = distillation_module(
            full,
            emulator,
            self.arch,
            self.plan,
            # What is compiled takes no stand-ins, and no other memory worth mentioning.
            replace(config, compile=False),
            use_positions=_takes_positions(emulator),
        )
        return _rehearsed(
            module, config.dtype, step, self._cached(ends, config, step) if cached else {}
        )

    def rehearse_finetuning(
        self, config: FinetuneConfig, step: Step, *, in_emulator: bool = True
    ) -> Rehearsal:
        """Return what a step of fine-tuning takes, of a bundle or (the baseline) the full model."""
        model = self.empty(self.emulator_config if in_emulator else None)
        whole = not in_emulator and config.method == "full"
        every = tuple(range(self.arch.num_blocks))
        indices = self.adapter_positions if in_emulator else every
        with torch.device("meta"):
            module = finetuning_module(
                model,
                self.arch,
                None if whole else indices,
                config,
                use_positions=_takes_positions(model),
            )
        return _rehearsed(module, config.dtype, step)

    def _cached(self, ends: Sequence[int], config: DistillConfig, step: Step) -> dict[str, Tensor]:
        """Return the columns of a batch that hold the teacher's outputs, ``(B, T, H)``."""
        shape = (step.batch_size, step.seq_len, self.config.get_text_config().hidden_size)
        dtype = DTYPES[config.dtype]
        return {f"{TEACHER}{end}": torch.empty(shape, dtype=dtype, device="meta") for end in ends}


def open_shapes(
    model: str | Path,
    plan: str,
    *,
    select: str = "uniform",
    blocks: str | None = None,
    notice: Notice | None = None,
) -> Shapes:
    """Return the shapes of a model and a plan; of the model only ``config.json`` is read.

    Raises:
        OffsiteError: There is no such model, or it cannot follow the plan.
    """
    config = load_config(model_at(model, ("config.json",)))
    drop_dropout(config)
    arch = resolve_architecture(config, blocks, notice)
    method = selection_method(select)
    # Which blocks a method keeps may take the weights and some text; here only their number counts.
    choose = SELECTION_METHODS["uniform"].choose if method.needs_text else method.choose
    split = parse_plan(plan, arch.num_blocks, lambda middle, count: choose(middle, count, None))
    if method.keeps_depth:
        split = replace(split, emulator=split.middle)
    check_separable(config, arch, split)
    return Shapes(config=config, arch=arch, plan=split)


def _rehearsed(
    module: nn.Module, dtype: ComputeDtype, step: Step, columns: Mapping[str, Tensor] = {}
) -> Rehearsal:
    compute = DTYPES[dtype]
    if step.replicated:
        set_dtypes(module, compute)
    else:
        module.to(compute)
    return rehearse(
        module,
        {**empty_batch(step.batch_size, step.seq_len, positions=step.packed), **columns},
        device="cuda" if step.gpu else "cpu",
        autocast=step.replicated and compute is torch.bfloat16,
    )


def _takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.base_model.forward).parameters
