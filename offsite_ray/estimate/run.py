# SPDX-License-Identifier: Apache-2.0
"""Estimate: what a plan takes, before anyone pays for it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from offsite_ray.architectures import DTYPES
from offsite_ray.config import DistillConfig, EstimateConfig, FinetuneConfig, Offload
from offsite_ray.errors import ConfigError
from offsite_ray.estimate.artefacts import Artefacts, artefacts_of, count_parameters
from offsite_ray.estimate.memory import Memory, Worker, memory_of
from offsite_ray.estimate.shapes import Shapes, Step, open_shapes
from offsite_ray.finetuning import FINETUNING_METHODS
from offsite_ray.training.sources import row_length

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from offsite_ray.architectures import Notice
    from offsite_ray.rehearsal import Operations, Rehearsal

_MOST_GPUS = 1024
_GPU_COUNTS = (1, 2, 4, 8)
"""Counts that are always listed."""
_OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "all")
_A100_TFLOPS = 312.0
"""Dense bf16 peak of an A100, by its data sheet: for bf16, where no other is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What is known of the full model and of what a plan makes of it."""

    family: str
    plan: str
    num_blocks: int
    num_kept: int
    """Blocks of the emulator model."""
    num_parameters: int
    num_emulator_parameters: int
    """Of the emulator model, tied ones once."""
    stored_dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What training takes with one setting."""

    num_trained: int
    """Parameters that train."""
    memory: Memory
    """Bytes of one worker."""
    fits: bool
    """Whether a GPU of the given memory holds them and the headroom."""
    operations: Operations
    """Floating-point operations of one forward and backward pass of one worker."""
    flops_per_token: float
    """Of a step, with what is recomputed."""
    flops_per_step: int
    """Over all workers."""
    tokens_per_s: float | None
    """Of all workers together, where what is not recomputed takes the given share of the peak; None
    where the peak is not known."""
    seconds: float | None
    """For the given number of tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """A way of cutting up distillation: its memory by the number of GPUs."""

    zero_stage: int
    offload: str
    total_bytes: Mapping[int, int]
    """Number of GPUs to bytes of each."""
    host_bytes: Mapping[int, int]
    """The same in the host's memory, for each GPU."""
    smallest_gpu_count: int | None
    """GPUs from which it fits; None: it fits with no number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a plan takes."""

    model: ModelFacts
    artefact_bytes: Artefacts
    distillation: Cost | None
    """With the asked setting; None where the plan keeps no emulator block."""
    smallest_gpu_count: int | None
    """GPUs from which the asked setting fits."""
    options: tuple[Option, ...]
    """Other ways to cut the same step up."""
    finetuning: Mapping[str, Cost | None]
    """Method to what it takes on the data owner's one GPU; None where it has nothing to train."""
    full_finetuning: Cost
    """Of the whole full model on one GPU: the baseline."""
    peak_tflops: float | None
    """Peak of one device that the times are reckoned with: the given one, or for bf16 an A100's."""
    tokens: int
    """What the seconds of training are for."""
    seconds: float
    """That it took to estimate."""


def estimate(config: EstimateConfig, notice: Notice | None = None) -> Estimate:
    """Return what a plan takes; of the model only ``config.json`` is read.

    Raises:
        OffsiteError: There is no such model, or it cannot follow the plan.
    """
    start = time.perf_counter()
    shapes = open_shapes(
        config.model, config.plan, select=config.select, blocks=config.blocks, notice=notice
    )
    row_length(shapes.config, config.seq_len, None)
    distillation = _distill_config(config)
    options: list[Option] = []
    cost = None
    if shapes.plan.emulator:
        rehearsals = _rehearsals(shapes, distillation, _step(config))
        options = list(_options(rehearsals, config))
        worker = _worker(config)
        cost = _cost(rehearsals[worker.replicates], worker, config)
    asked = (o for o in options if (o.zero_stage, o.offload) == (config.zero_stage, config.offload))
    return Estimate(
        model=_facts(shapes),
        artefact_bytes=artefacts_of(shapes, distillation, config.rank),
        distillation=cost,
        smallest_gpu_count=next((option.smallest_gpu_count for option in asked), None),
        options=tuple(options),
        finetuning={name: _finetuning(shapes, config, name) for name in FINETUNING_METHODS},
        full_finetuning=_baseline(shapes, config),
        peak_tflops=peak_tflops(config),
        tokens=config.tokens,
        seconds=time.perf_counter() - start,
    )


def _facts(shapes: Shapes) -> ModelFacts:
    return ModelFacts(
        family=shapes.arch.family.model_type,
        plan=shapes.plan.short,
        num_blocks=shapes.arch.num_blocks,
        num_kept=len(shapes.plan.kept),
        num_parameters=count_parameters(shapes.empty()),
        num_emulator_parameters=count_parameters(shapes.empty(shapes.emulator_config)),
        stored_dtype=str(shapes.stored_dtype).removeprefix("torch."),
    )


def _distill_config(config: EstimateConfig) -> DistillConfig:
    return DistillConfig(
        model=config.model,
        bundle="-",
        data=("-",),
        out="-",
        num_workers=config.gpus,
        batch_size=config.batch_size,
        dtype=config.dtype,
        gradient_checkpointing=config.gradient_checkpointing,
        hidden_weight=config.hidden_weight,
        layerwise_weight=config.layerwise_weight,
        logits_weight=config.logits_weight,
        lm_weight=config.lm_weight,
        teacher_cache="-" if config.teacher_cache else None,
    )


def micro_batch(config: EstimateConfig) -> int:
    """Return the sequences in one forward pass of one device."""
    share = config.batch_size // config.gpus
    return min(config.micro_batch_size or share, share)


def _step(config: EstimateConfig) -> Step:
    return Step(
        batch_size=micro_batch(config),
        seq_len=config.seq_len,
        packed=config.packed,
        gpu=config.use_gpu,
    )


def _worker(config: EstimateConfig) -> Worker:
    own = config.batch_size // config.gpus
    return Worker(
        zero_stage=config.zero_stage,
        offload=config.offload,
        num_workers=config.gpus,
        itemsize=DTYPES[config.dtype].itemsize,
        num_micro_batches=-(-own // micro_batch(config)),
        gpu=config.use_gpu,
    )


def _rehearsals(shapes: Shapes, config: DistillConfig, step: Step) -> dict[bool, Rehearsal]:
    """Return the step of distillation in both forms: replicated, and not."""
    replicated = shapes.rehearse_distillation(config, step)
    if config.dtype == "fp32":
        return {True: replicated, False: replicated}
    cut = shapes.rehearse_distillation(config, replace(step, replicated=False))
    return {True: replicated, False: cut}


def _options(rehearsals: Mapping[bool, Rehearsal], config: EstimateConfig) -> Iterator[Option]:
    counts = sorted({*_GPU_COUNTS, config.gpus})
    for stage in range(4):
        for offload in _OFFLOADS:
            worker = replace(_worker(config), zero_stage=stage, offload=offload)
            if not worker.is_possible:
                continue
            rehearsal = rehearsals[worker.replicates]
            by_count = {
                count: memory_of(rehearsal, replace(worker, num_workers=count)) for count in counts
            }
            yield Option(
                zero_stage=stage,
                offload=offload,
                total_bytes={count: memory.total for count, memory in by_count.items()},
                host_bytes={count: memory.host for count, memory in by_count.items()},
                smallest_gpu_count=_smallest(rehearsal, worker, config),
            )


def _smallest(rehearsal: Rehearsal, worker: Worker, config: EstimateConfig) -> int | None:
    counts = range(1, _MOST_GPUS + 1) if worker.zero_stage else (1, 2)
    memories = ((n, memory_of(rehearsal, replace(worker, num_workers=n))) for n in counts)
    least = None
    for count, memory in memories:
        if not _fits(memory, config):
            least = None
        elif least is None:
            least = count
    return least


def _fits(memory: Memory, config: EstimateConfig) -> bool:
    return memory.total <= config.gpu_memory_gib * 2**30 * (1 - config.headroom)


def _finetuning(shapes: Shapes, config: EstimateConfig, method: str) -> Cost | None:
    """Return what fine-tuning a bundle takes in a process of its own, as ``finetune`` runs it."""
    try:
        rehearsal = shapes.rehearse_finetuning(_finetune_config(config, method), _step(config))
    except ConfigError:  # nothing to train, as bitfit without a bias
        return None
    return _cost(rehearsal, _alone(config), config)


def _baseline(shapes: Shapes, config: EstimateConfig) -> Cost:
    rehearsal = shapes.rehearse_finetuning(
        _finetune_config(config, "full"), _step(config), in_emulator=False
    )
    return _cost(rehearsal, _alone(config), config)


def _finetune_config(config: EstimateConfig, method: str) -> FinetuneConfig:
    return FinetuneConfig(
        bundle="-",
        data=("-",),
        out="-",
        method=method,
        rank=config.rank,
        dtype=config.dtype,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def _alone(config: EstimateConfig) -> Worker:
    """Return the data owner's worker: one forward pass a step, without Ray."""
    return Worker(zero_stage=None, itemsize=DTYPES[config.dtype].itemsize, gpu=config.use_gpu)


def peak_tflops(config: EstimateConfig) -> float | None:
    """Return the peak of one device that the time is reckoned with; None where it is not known."""
    known = config.use_gpu and config.dtype == "bf16"
    return config.peak_tflops or (_A100_TFLOPS if known else None)


def _cost(rehearsal: Rehearsal, worker: Worker, config: EstimateConfig) -> Cost:
    memory = memory_of(rehearsal, worker)
    passes = worker.num_workers * worker.num_micro_batches
    num_tokens = micro_batch(config) * config.seq_len
    per_token = rehearsal.operations.total / num_tokens
    peak = peak_tflops(config)
    speed = None
    if peak is not None:
        useful = rehearsal.operations.useful / num_tokens
        speed = worker.num_workers * peak * 1e12 * config.utilisation / useful
    return Cost(
        num_trained=rehearsal.trained,
        memory=memory,
        fits=_fits(memory, config),
        operations=rehearsal.operations,
        flops_per_token=per_token,
        flops_per_step=rehearsal.operations.total * passes,
        tokens_per_s=speed,
        seconds=None if speed is None else config.tokens / speed,
    )
