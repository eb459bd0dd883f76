# SPDX-License-Identifier: Apache-2.0
"""Distil: train the emulator blocks of a bundle, and write the bundle again."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.architectures import Notice, disk_state, empty_model
from offsite_ray.bundle import PackedDirectory
from offsite_ray.compression import GROUP_SIZE
from offsite_ray.distillation.cache import cache_task, ensure_cache, needed_ends
from offsite_ray.distillation.module import TEACHER, distillation_module
from offsite_ray.distillation.task import DistillTask
from offsite_ray.distillation.teacher import fill_here
from offsite_ray.emulator import (
    EmulatorBundle,
    blocks_path,
    check_fits,
    open_bundle,
    open_full_model,
    write_distilled,
)
from offsite_ray.errors import ConfigError
from offsite_ray.rehearsal import empty_batch, rehearse
from offsite_ray.results import TrainingHistory, recipe_of
from offsite_ray.storage import found_by_all
from offsite_ray.training import (
    LANGUAGE_MODEL,
    Fit,
    Report,
    check_out,
    keeps_documents_apart,
    run_directory,
)
from offsite_ray.training.sources import prepared_for
from offsite_ray.uris import refuse_uri, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from offsite_ray.bundle import Manifest
    from offsite_ray.config import DistillConfig
    from offsite_ray.data import PreparedData
    from offsite_ray.distillation.cache import CacheTask, Fill
    from offsite_ray.full_model import FullModel
    from offsite_ray.training import TrainingOutcome


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillResult:
    """What ``distill`` made."""

    out: str
    id: str
    first_losses: Mapping[str, float]
    """Held-out losses before the first step, by part; ``loss`` is their weighted sum."""
    last_losses: Mapping[str, float]
    """The same of the weights that were written."""
    history: TrainingHistory
    seconds: float


def distill(
    config: DistillConfig,
    fit: Fit,
    report: Report,
    notice: Notice | None = None,
    fill: Fill = fill_here,
) -> DistillResult:
    """Train the emulator blocks of a bundle against its full model; write the bundle again.

    Args:
        config: What to train, on what, how.
        fit: Runs the training: on Ray, or in this process.
        report: Told of each step and evaluation.
        notice: Told what is unusual but not wrong.
        fill: Writes the teacher's outputs, with ``config.teacher_cache``: on Ray, or in this
            process.

    Raises:
        OffsiteError: Model, bundle or data cannot be used; nothing is left behind.
    """
    start = time.perf_counter()
    refuse_uri("--teacher-cache", config.teacher_cache)
    check_out(config.out, config.resume)
    bundle = open_bundle(config.bundle)
    if not bundle.plan.emulator:
        raise ConfigError(
            f"{shown(config.bundle)} keeps no emulator block ({bundle.plan.short}), so there is "
            "nothing to distil; compress with a plan that keeps one"
        )
    full = open_full_model(config.model, blocks_path(bundle.manifest))
    check_fits(bundle.path, bundle.manifest, full)
    packed = _told_of_packing(bundle, notice)
    apart = keeps_documents_apart(full.config, full.arch, full.weights)
    with run_directory(config.out, config.resume) as run_dir:
        data = prepared_for(config.data, full.path, full.config, config.seq_len, run_dir, notice)
        cache = _filled_cache(config, full, bundle, data, fill, notice, use_positions=apart)
        task = DistillTask(
            model=found_by_all(config.model, full.path),
            bundle=found_by_all(config.bundle, bundle.path),
            bundle_id=bundle.manifest.id,
            plan=bundle.plan,
            blocks=blocks_path(bundle.manifest),
            config=config,
            data=data,
            use_positions=apart,
            cache=cache,
        )
        task = replace(task, flops_per_token=_flops_per_token(task, full, bundle))
        outcome = fit(task, config, run_dir, report)
        manifest = _write(bundle, task, outcome, packed)
    history = outcome.history
    return DistillResult(
        out=shown(config.out),
        id=manifest.id,
        first_losses=history.evaluations[0].losses,
        last_losses=_result_losses(history),
        history=history,
        seconds=time.perf_counter() - start,
    )


def _result_losses(history: TrainingHistory) -> Mapping[str, float]:
    """Return the held-out losses of the weights that are the result."""
    return (history.result_evaluation or history.evaluations[-1]).losses


def _write(
    bundle: EmulatorBundle,
    task: DistillTask,
    outcome: TrainingOutcome,
    packed: Mapping[str, Any],
) -> Manifest:
    """Write the bundle with what was trained, and how."""
    history = outcome.history
    recipe = recipe_of(
        task.config,
        data=task.data.digest,
        losses=list(task.loss_weights),
        changes=history.changes,
        **packed,
    )
    measured = {
        "distillation_seconds": history.seconds,
        "distillation_peak_memory_bytes": history.peak_memory_bytes,
        "distillation_losses": dict(_result_losses(history)),
    }
    tensors = _bundle_state(bundle, task, outcome.state)
    return write_distilled(bundle, tensors, task.config.out, recipe, measured)


def _told_of_packing(bundle: EmulatorBundle, notice: Notice | None) -> dict[str, Any]:
    """Say what becomes of packed matrices; return what the recipe is to say of it."""
    if not isinstance(bundle.weights, PackedDirectory):
        return {}
    bits = next(tensor.bits for tensor in bundle.weights.packed.values())
    if notice is not None:
        notice(
            f"{bundle.path} has matrices packed in {bits} bits: they train as what they "
            "stand for, and are rounded to as many bits again when they are written, which the "
            "losses do not show; after 'offsite-ray unpack' they stay as they were trained"
        )
    return {"rounded_to": {"bits": bits, "group_size": GROUP_SIZE}}


def _flops_per_token(task: DistillTask, full: FullModel, bundle: EmulatorBundle) -> float | None:
    """Return the operations of a step for each token, where something is to be told of them."""
    config, length = task.config, task.data.block_size
    if not (config.log_dir or config.report_to or config.peak_tflops):
        return None
    module = distillation_module(
        empty_model(full.config) if task.runs_teacher else None,
        empty_model(bundle.config),
        bundle.arch,
        task.plan,
        replace(config, compile=False, gradient_checkpointing=False),
        use_positions=False,
    )
    batch = empty_batch(1, length, positions=False)
    if task.cache is not None:
        batch |= {
            f"{TEACHER}{end}": torch.empty(1, *task.cache.key.shape, device="meta")
            for end in task.cache.key.ends
        }
    return rehearse(module, batch, autocast=False).operations.useful / length


def _filled_cache(
    config: DistillConfig,
    full: FullModel,
    bundle: EmulatorBundle,
    data: PreparedData,
    fill: Fill,
    notice: Notice | None,
    *,
    use_positions: bool,
) -> CacheTask | None:
    """Return the cache to distil from, written if it was not there; None where none is asked for.

    Raises:
        ConfigError: These losses or this plan cannot be distilled from a cache.
        CacheError: The one that is there is of something else.
    """
    if config.teacher_cache is None:
        return None
    if not needed_ends(bundle.plan, config):
        raise ConfigError("the losses need no teacher, so there is nothing to cache")
    if empty := [segment for segment in bundle.plan.segments if not segment.kept]:
        raise ConfigError(
            f"the emulator keeps none of the blocks {list(empty[0].blocks)}, and without the full "
            "model there is no place for their error; distil without --teacher-cache, or keep "
            "one of them"
        )
    blocks = blocks_path(bundle.manifest)
    task = cache_task(full, bundle.plan, config, data, blocks, use_positions=use_positions)
    ensure_cache(task, config, fill, notice or (lambda _: None))
    return task


def _bundle_state(
    bundle: EmulatorBundle, task: DistillTask, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return trained tensors, named as in the slots, by their name on disk in the bundle."""
    own = {}
    for name, tensor in state.items():
        inner = name.removeprefix(LANGUAGE_MODEL)
        index = bundle.arch.block_of(inner)
        if index is not None:
            place = task.plan.kept.index(index) if task.runs_teacher else index
            own[bundle.arch.rename(inner, place).replace(".emulator.", ".", 1)] = tensor
    return disk_state(bundle.config, bundle.arch, own, bundle.weights.tensors)
