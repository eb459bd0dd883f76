# SPDX-License-Identifier: Apache-2.0
"""Choosing blocks: from a plan and a selection method to the blocks of a bundle."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from offsite_ray.architectures import block_kinds, check_separable
from offsite_ray.calibration import Calibration, calibrate
from offsite_ray.errors import ConfigError, PlanError
from offsite_ray.selection import nearest_kept, selection_method
from offsite_ray.split import SplitPlan, parse_plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offsite_ray.architectures import Notice
    from offsite_ray.config import CompressConfig
    from offsite_ray.full_model import FullModel


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenBlocks:
    """What a bundle is made of."""

    plan: SplitPlan
    stored: tuple[int, ...]
    """Block of the full model that stands at each position of the emulator model; that of
    ``plan.kept``, or of a shared block the one that is copied."""
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

    def select(middle: Sequence[int], num_kept: int) -> Sequence[int]:
        if not method.needs_text:
            return method.choose(middle, num_kept, None)
        if not config.calibration:
            raise ConfigError(
                f"--select {method.name} looks at what the full model does with text; give some "
                "with --calibration FILE"
            )
        calibration: Calibration = calibrate(full, config, notice)
        recipe["calibration"] = calibration.recipe
        return method.choose(middle, num_kept, calibration)

    plan = parse_plan(config.plan, full.arch.num_blocks, select)
    check_separable(full.config, full.arch, plan)
    if not method.shares or plan.keeps_every_block:
        return ChosenBlocks(plan=plan, stored=plan.kept, recipe=recipe)
    try:
        nearest = nearest_kept(block_kinds(full.config), plan.kept)
    except ValueError as error:
        raise PlanError(f"{config.plan!r} with --select {method.name}: {error}") from error
    shared = replace(plan, emulator=plan.middle)
    stored = tuple(nearest[index] for index in shared.kept)
    return ChosenBlocks(plan=shared, stored=stored, recipe={**recipe, "copies_of": list(stored)})
