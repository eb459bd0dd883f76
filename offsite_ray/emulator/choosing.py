# SPDX-License-Identifier: Apache-2.0
"""Choosing blocks: from a plan and a selection method to the blocks of a bundle."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.architectures import block_kinds, check_separable, empty_model, stored_alone
from offsite_ray.calibration import Calibration, calibrate
from offsite_ray.errors import ConfigError, PlanError
from offsite_ray.selection import nearest_kept, selection_method
from offsite_ray.split import SplitPlan, parse_plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from offsite_ray.architectures import Notice
    from offsite_ray.config import CompressConfig
    from offsite_ray.full_model import FullModel


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenBlocks:
    """What a bundle is made of."""

    plan: SplitPlan
    method: str
    """Selection method that chose them; ``explicit`` where the plan names them."""
    stored: tuple[int, ...]
    """Block of the full model that stands at each position of the emulator model; that of
    ``plan.kept``, or of a shared block the one that is copied."""
    harmonizers: Mapping[str, Tensor] = field(default_factory=dict)
    """What is not zero, from the first row and column on, of tensors of the full model in the place
    of whose blocks harmonizers stand; by name on disk."""
    replaced: frozenset[int] = frozenset()
    """Those blocks."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """What else there is to say of how they were chosen."""


def choose_blocks(full: FullModel, config: CompressConfig, notice: Notice | None) -> ChosenBlocks:
    """Choose the blocks that a configuration asks for.

    Raises:
        PlanError: The plan cannot be followed, or the method selects nothing for it.
        ConfigError: The method needs text, and there is none.
        FamilyError: The model cannot be cut so.
    """
    method = selection_method(config.select)
    recipe: dict[str, Any] = {}
    calibration: Calibration | None = None
    asked = False

    def select(middle: Sequence[int], num_kept: int) -> Sequence[int]:
        nonlocal asked, calibration
        asked = True
        if not method.needs_text:
            return method.choose(middle, num_kept, None)
        if not config.calibration:
            raise ConfigError(
                f"--select {method.name} looks at what the full model does with text; give some "
                "with --calibration FILE"
            )
        calibration = calibrate(full, config, notice)
        recipe["calibration"] = calibration.recipe
        return method.choose(middle, num_kept, calibration)

    plan = parse_plan(config.plan, full.arch.num_blocks, select)
    check_separable(full.config, full.arch, plan)
    if not method.keeps_depth or plan.keeps_every_block:
        name = method.name if asked else "explicit"
        return ChosenBlocks(plan=plan, method=name, stored=plan.kept, recipe=recipe)
    if method.replaces:
        if calibration is None:
            raise PlanError(
                f"{method.name} learns which blocks to keep, and {config.plan!r} names them; give "
                "a plan that numbers them, such as '2-4-2' or 'adapter=0,7 keep=2'"
            )
        return _with_harmonizers(full, plan, calibration, config, recipe)
    try:
        nearest = nearest_kept(block_kinds(full.config), plan.kept)
    except ValueError as error:
        raise PlanError(f"{config.plan!r} with --select {method.name}: {error}") from error
    shared = replace(plan, emulator=plan.middle)
    stored = tuple(nearest[index] for index in shared.kept)
    return ChosenBlocks(
        plan=shared,
        method=method.name,
        stored=stored,
        recipe={**recipe, "copies_of": list(stored)},
    )


def _with_harmonizers(
    full: FullModel,
    plan: SplitPlan,
    calibration: Calibration,
    config: CompressConfig,
    recipe: Mapping[str, Any],
) -> ChosenBlocks:
    """Return the blocks of a bundle where harmonizers stand for those that the plan drops."""
    learnt = calibration.replacement(plan.middle, len(plan.emulator))
    on_disk = stored_alone(full.config, full.arch, full.weights.tensors)
    tensors: dict[str, Tensor] = {}
    for name, parameter in empty_model(full.config, full.arch.family.auto_class).named_parameters():
        index = full.arch.block_of(name)
        if index is not None and index in learnt.harmonizers:
            path = name.removeprefix(f"{full.arch.family.blocks}.{index}.")
            dead = torch.empty((0,) * parameter.ndim)
            tensors[on_disk[name]] = learnt.harmonizers[index].get(path, dead)
    how = {
        "blocks": sorted(learnt.harmonizers),
        "rank": config.harmonizer_rank,
        "steps": config.harmonizer_steps,
        "scores": learnt.scores,
    }
    whole = replace(plan, emulator=plan.middle)
    return ChosenBlocks(
        plan=whole,
        method=config.select,
        stored=whole.kept,
        harmonizers=tensors,
        replaced=frozenset(learnt.harmonizers),
        recipe={**recipe, "harmonizers": how},
    )
