# SPDX-License-Identifier: Apache-2.0
"""A dry run of distillation: plan, estimate and resources, without a weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offsite_ray.bundle import MANIFEST, read_manifest
from offsite_ray.config import EstimateConfig
from offsite_ray.errors import ConfigError
from offsite_ray.estimate.run import Estimate, estimate

if TYPE_CHECKING:
    from offsite_ray.architectures import Notice
    from offsite_ray.config import DistillConfig

_BYTES_OF_STATE = 12
"""Of a parameter in a checkpoint: its float32 master and two moments."""
_SEQ_LEN = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """What a distillation would do, and what it would take."""

    plan: str
    num_workers: int
    """Ray Train workers, with a GPU each where there are GPUs; 0: this process."""
    zero_stage: int
    offload: str
    total_steps: int | None
    """None where the data decides."""
    tokens_per_step: int
    checkpoint_bytes: int
    """Of one checkpoint; the last and the best are kept."""
    estimate: Estimate


def dry_run(
    config: DistillConfig,
    *,
    plan: str | None = None,
    seq_len: int | None = None,
    notice: Notice | None = None,
) -> DryRun:
    """Return what a distillation would take; nothing is trained and no weight is read.

    Args:
        config: As for the run itself.
        plan: Split plan, where the bundle is not there yet.
        seq_len: Tokens in a sequence, where neither ``config`` nor this says: 512.
        notice: Told what is unusual but not wrong.

    Raises:
        ConfigError: There is neither a bundle nor a plan, or nothing to distil.
        OffsiteError: The full model's config cannot be used.
    """
    if (Path(config.bundle) / MANIFEST).is_file():
        kept = read_manifest(Path(config.bundle)).plan
        adapter, emulator = (",".join(map(str, part)) for part in (kept.adapter, kept.emulator))
        plan = f"adapter={adapter} emulator={emulator}"
    if plan is None:
        raise ConfigError(f"{config.bundle} is no bundle; make it first: offsite-ray compress")
    length = config.seq_len or seq_len or _SEQ_LEN
    tokens = config.batch_size * length
    found = estimate(_estimate_config(config, plan, length), notice)
    if found.distillation is None:
        raise ConfigError(f"the plan {plan} keeps no emulator block, so there is nothing to distil")
    return DryRun(
        plan=found.model.plan,
        num_workers=config.num_workers,
        zero_stage=config.zero_stage,
        offload=config.offload,
        total_steps=config.max_steps,
        tokens_per_step=tokens,
        checkpoint_bytes=_BYTES_OF_STATE * found.distillation.num_trained,
        estimate=found,
    )


def _estimate_config(config: DistillConfig, plan: str, seq_len: int) -> EstimateConfig:
    return EstimateConfig(
        model=config.model,
        plan=plan,
        gpus=max(1, config.num_workers),
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        seq_len=seq_len,
        dtype=config.dtype,
        gradient_checkpointing=config.gradient_checkpointing,
        zero_stage=config.zero_stage,
        offload=config.offload,
        hidden_weight=config.hidden_weight,
        layerwise_weight=config.layerwise_weight,
        logits_weight=config.logits_weight,
        lm_weight=config.lm_weight,
        teacher_cache=config.teacher_cache is not None,
        tokens=(config.max_steps or 1) * config.batch_size * seq_len,
        peak_tflops=config.peak_tflops,
        use_gpu=config.use_gpu is not False,
    )
