# SPDX-License-Identifier: Apache-2.0
"""What a sweep is of, looked at before anything is written: its model, its space, its jobs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offsite_ray.architectures import load_config, resolve_architecture
from offsite_ray.errors import ConfigError
from offsite_ray.storage import model_at
from offsite_ray.tune.checks import check_measuring, check_space, trainable_variants
from offsite_ray.tune.plan import Planner
from offsite_ray.tune.space import draw, every_value, grid, stage_fields
from offsite_ray.uris import refuse_uri

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers.configuration_utils import PretrainedConfig

    from offsite_ray.architectures import Notice
    from offsite_ray.config import SweepConfig
    from offsite_ray.tune.space import Point, Variant


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """The full model, and the space with what it means for that model."""

    model: Path
    config: PretrainedConfig
    planner: Planner
    variants: list[Variant]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSize:
    """How many jobs a sweep is of; nothing of it has been run."""

    jobs: int
    full_model: int
    """Measurements of the full model as it is."""
    full_fine_tuning: int
    bounds: int
    emulators: int
    """Seeds counted, as in all the others."""
    controls: int
    """Of the emulators, those that nobody asked for: uniform and tail drops of equal size."""
    distillations: int
    """Emulators that are distilled; those that differ in their fine-tuning alone are one."""
    distill_steps: int | None
    """Steps of all of them together; None where some are given in epochs."""


def open_sweep(config: SweepConfig, notice: Notice) -> Opened:
    """Return what a sweep is of, everything about it checked.

    Raises:
        OffsiteError: The space, the texts or the model cannot be used.
    """
    model = model_at(config.model)
    model_config = load_config(model)
    arch = resolve_architecture(model_config, config.blocks)
    planner = Planner(
        num_blocks=arch.num_blocks,
        seeds=range(config.seed, config.seed + config.seeds),
        baseline=stage_fields("finetune", config.baseline or {}),
    )
    variants = trainable_variants(config, model_config, arch, notice)
    check_space(variants, config)
    planner.jobs(grid(variants) if config.search == "grid" else every_value(variants))
    check_measuring(config, model, model_config)
    return Opened(model=model, config=model_config, planner=planner, variants=variants)


def points_of(variants: Sequence[Variant], config: SweepConfig) -> list[Point]:
    """Return the points of a grid or a random search."""
    if config.search == "grid":
        return grid(variants)
    return draw(variants, config.num_points or 1, config.seed)


def dry_run(config: SweepConfig, notice: Notice) -> SweepSize:
    """Return how many jobs a sweep is of.

    Raises:
        OffsiteError: The space, the texts or the model cannot be used; or Optuna is to ask, and
            nobody knows for what.
    """
    if config.search == "optuna":
        raise ConfigError(
            "what Optuna asks for is not known before; leave dry_run out, or take search=random"
        )
    refuse_uri("--out", config.out)
    opened = open_sweep(config, notice)
    jobs = opened.planner.jobs(points_of(opened.variants, config))
    roles = Counter(job.role for job in jobs)
    distilled = {job.emulator: job.settings["distill"] for job in jobs if "distill" in job.settings}
    steps = [settings.get("max_steps") for settings in distilled.values()]
    return SweepSize(
        jobs=len(jobs),
        full_model=roles["full"],
        full_fine_tuning=roles["fine_tuned"],
        bounds=roles["bound"],
        emulators=roles["emulator"],
        controls=sum(job.control is not None for job in jobs),
        distillations=len(distilled),
        distill_steps=None if None in steps else sum(map(int, steps)),  # type: ignore[arg-type]
    )
