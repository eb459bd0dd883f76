# SPDX-License-Identifier: Apache-2.0
"""A dry run of distillation: plan, estimate and resources, without a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from offsite_ray.architectures import load_config
from offsite_ray.bundle import MANIFEST, read_manifest
from offsite_ray.config import EstimateConfig
from offsite_ray.data import is_prepared
from offsite_ray.data.manifest import read_data_manifest
from offsite_ray.emulator import blocks_path
from offsite_ray.errors import ConfigError
from offsite_ray.estimate.run import Estimate, estimate
from offsite_ray.storage import DATA_MANIFEST, fetched, model_at
from offsite_ray.training.sources import row_length
from offsite_ray.uris import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offsite_ray.architectures import Notice
    from offsite_ray.config import DistillConfig


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
    config: DistillConfig, given: EstimateConfig | None = None, notice: Notice | None = None
) -> DryRun:
    """Return what a distillation would take; nothing is trained and no weight is read.

    Args:
        config: As for the run itself.
        given: What a run does not say: the GPUs' memory, and, where they are not there yet, the
            plan of the bundle and the length of the data's rows.
        notice: Told what is unusual but not wrong.

    Raises:
        ConfigError: There is neither a bundle nor a plan, or nothing to distil.
        OffsiteError: The full model's config cannot be used.
    """
    model = load_config(model_at(config.model, ("config.json",)))
    bundle = fetched(config.bundle, (MANIFEST,))
    if (bundle / MANIFEST).is_file():
        manifest = read_manifest(bundle)
        usual = EstimateConfig(model=config.model, plan="", seq_len=row_length(model, None, None))
        plan, blocks = manifest.plan.spelled_out, blocks_path(manifest)
        given = replace(given or usual, plan=plan, blocks=blocks)
    if given is None:
        raise ConfigError(
            f"{shown(config.bundle)} is no bundle; make it first: offsite-ray compress"
        )
    prepared = _prepared_length(config.data)
    length = row_length(model, config.seq_len, prepared)
    if prepared is None and config.seq_len is None:
        length = row_length(model, given.seq_len, None)
    found = estimate(_estimate_config(config, given, length), notice)
    if found.distillation is None:
        raise ConfigError(
            f"the plan {given.plan} keeps no emulator block, so there is nothing to distil"
        )
    return DryRun(
        plan=found.model.plan,
        num_workers=config.num_workers,
        zero_stage=config.zero_stage,
        offload=config.offload,
        total_steps=config.max_steps,
        tokens_per_step=config.batch_size * length,
        checkpoint_bytes=found.artefact_bytes.distillation_checkpoint,
        estimate=found,
    )


def _prepared_length(sources: Sequence[str]) -> int | None:
    """Return the tokens of a row of data that is prepared."""
    for source in sources:
        if is_prepared(source):
            return read_data_manifest(fetched(source, (DATA_MANIFEST,))).block_size
    return None


def _estimate_config(config: DistillConfig, given: EstimateConfig, length: int) -> EstimateConfig:
    return replace(
        given,
        model=config.model,
        gpus=max(1, config.num_workers),
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        seq_len=length,
        dtype=config.dtype,
        gradient_checkpointing=config.gradient_checkpointing,
        zero_stage=config.zero_stage,
        offload=config.offload,
        hidden_weight=config.hidden_weight,
        layerwise_weight=config.layerwise_weight,
        logits_weight=config.logits_weight,
        lm_weight=config.lm_weight,
        teacher_cache=config.teacher_cache is not None,
        tokens=(config.max_steps or 1) * config.batch_size * length,
        peak_tflops=config.peak_tflops or given.peak_tflops,
        use_gpu=config.use_gpu is not False,
    )
