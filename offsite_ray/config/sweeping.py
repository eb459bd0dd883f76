# SPDX-License-Identifier: Apache-2.0
"""Configuration of a sweep over every knob of a trial."""

from __future__ import annotations

import math
from collections.abc import Mapping  # noqa: TC003  # the flags are read from the annotations
from dataclasses import dataclass
from typing import Any, Literal

from offsite_ray.config.ranges import check_least
from offsite_ray.config.training import ComputeDtype  # noqa: TC001  # as above
from offsite_ray.errors import ConfigError, unknown_name

Preset = Literal["figure3", "figure4", "table4", "table5"]
"""Ablations of the paper that a sweep can repeat."""

OBJECTIVES = ("plug_in", "emulator", "bytes")
"""What a sweep can be for: plug-in quality up, tuned emulator's quality down, bytes down."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """Try many emulators, with their controls, and find those that are worth having."""

    model: str
    """Directory of the full model."""
    private: tuple[str, ...]
    """Text to fine-tune on: prepared data, files, or the name of a dataset."""
    out: str
    """Directory of the sweep; the same command goes on with what is there."""
    space: Mapping[str, Any] | None = None
    """Knobs by verb (compress, distill, finetune): a value, a list of values, or a range."""
    preset: Preset | None = None
    """Ablation of the paper, for any model; `space` adds to it and wins over it."""
    public: tuple[str, ...] = ()
    """Text to distil on; needed where a trial distils."""
    text: tuple[str, ...] = ()
    """Held-out text: .txt, .jsonl or .parquet files; gives losses, and then the gaps."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks; the gaps are of their mean score where no text is given."""
    task_data: tuple[str, ...] = ()
    """TASK=FILE: local file that a stock task reads its documents from."""
    task_path: tuple[str, ...] = ()
    """Directories or YAML files with own lm-eval tasks."""
    task_limit: int | None = None
    """Documents of each task; by default all."""
    blocks: str | None = None
    """Path of the block list in a model whose family is in no table, e.g. 'model.layers'."""
    seq_len: int = 512
    """Tokens in a sequence, for training and evaluation."""
    batch_size: int = 8
    """Sequences in one forward pass of an evaluation."""
    dtype: ComputeDtype = "fp32"
    """Arithmetic of every training and evaluation; the dtype of the weights shares their memory."""
    teacher_cache: bool = False
    """Compute the teacher's outputs on the public text once, and distil all emulators from them."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """How points are chosen: every combination, by chance, or by Optuna, if installed."""
    num_points: int | None = None
    """Points that a random search or Optuna tries; a grid has as many as it has."""
    seeds: int = 1
    """Times that each point is run, with seeds from `seed` on; 3 give a spread."""
    seed: int = 0
    """First seed, and that of the search."""
    baseline: Mapping[str, Any] | None = None
    """Fields of finetune that the bound and full fine-tuning use instead of the trial's."""
    objectives: tuple[str, ...] = OBJECTIVES
    """What the front is of: plug_in, emulator, bytes; the winner is the best where it is one."""
    privacy_weight: float = 0.5
    """Weight of the privacy gap against that of the utility gap, from 0 to 1, for the winner."""
    early_stop: bool = False
    """Stop distillations that are behind at a step where others were, as ASHA does."""
    grace_steps: int = 10
    """Steps of distillation before the first of these comparisons."""
    reduction_factor: int = 3
    """One in so many goes on; the next comparison is after so many times the steps."""
    proxy: str = "loss"
    """Part of the held-out loss of distillation that is compared, e.g. loss, hidden or lm."""
    max_concurrent: int | None = None
    """Trials at a time; 0: one after the other in this process, without Ray; by default all."""
    num_cpus: float = 1.0
    """CPUs of a trial; a fraction lets several share one."""
    num_gpus: float = 0.0
    """GPUs of a trial; a fraction lets several share one."""
    retries: int = 1
    """Times that a trial that crashed is run again before it counts as failed."""
    keep_bundles: bool = False
    """Keep every emulator bundle; otherwise those of the front and the winner's."""
    dry_run: bool = False
    """Only count the jobs and the steps of distillation; nothing is run or written."""

    def __post_init__(self) -> None:
        """Check ranges; raise :class:`ConfigError`."""
        if not self.text and not self.tasks:
            raise ConfigError("nothing to measure: give --text FILE or --tasks NAME, or both")
        if self.space is None and self.preset is None:
            raise ConfigError("nothing to try: give a space (in the file of --config) or --preset")
        for objective in self.objectives:
            if objective not in OBJECTIVES:
                raise ConfigError(unknown_name("objective", objective, OBJECTIVES))
        if not self.objectives:
            raise ConfigError(f"objectives is empty; name some of {', '.join(OBJECTIVES)}")
        check_least(self, 1, "seeds", "num_points", "batch_size", "grace_steps", "task_limit")
        check_least(self, 2, "seq_len", "reduction_factor")
        check_least(self, 0, "seed", "retries", "max_concurrent")
        if not (math.isfinite(self.num_cpus) and self.num_cpus > 0):
            raise ConfigError(f"num_cpus={self.num_cpus} must be a positive number")
        if not (math.isfinite(self.num_gpus) and self.num_gpus >= 0):
            raise ConfigError(f"num_gpus={self.num_gpus} must be 0 or a positive number")
        if not 0 <= self.privacy_weight <= 1:
            raise ConfigError(f"privacy_weight={self.privacy_weight} must be from 0 to 1")
        if (self.search == "grid") == (self.num_points is not None):
            how = "is for random and optuna" if self.search == "grid" else "is needed"
            raise ConfigError(f"num_points={self.num_points} with search={self.search}: it {how}")
