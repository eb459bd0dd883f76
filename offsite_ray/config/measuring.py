# SPDX-License-Identifier: Apache-2.0
"""Configurations of the verbs that measure or predict."""

from __future__ import annotations

import math
from dataclasses import dataclass

from offsite_ray.config.ranges import check_least
from offsite_ray.config.training import OFFLOAD_STAGES, ComputeDtype, Offload
from offsite_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Measure the five settings, the bound and both gaps, as far as the artefacts are given."""

    model: str
    """Directory of the full model."""
    finetuned: str | None = None
    """Fully fine-tuned model (setting: full fine-tuned)."""
    bundle: str | None = None
    """Emulator bundle (settings: emulator zero-shot and, with an adapter, fine-tuned)."""
    adapter: str | None = None
    """Adapter bundle trained against `bundle` (settings: emulator fine-tuned, plug-in)."""
    bound: str | None = None
    """Adapter bundle trained inside the full model (setting: bound)."""
    blocks: str | None = None
    """Path of the block list in a model whose family is in no table; a bundle knows it."""
    text: tuple[str, ...] = ()
    """Held-out text: .txt, .jsonl or .parquet files; gives perplexities."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks."""
    task_data: tuple[str, ...] = ()
    """TASK=FILE: local file that a stock task reads its documents from."""
    task_path: tuple[str, ...] = ()
    """Directories or YAML files with own lm-eval tasks."""
    task_limit: int | None = None
    """Documents of each task; by default all."""
    num_fewshot: int | None = None
    """Examples in each task's prompt; by default what the task says."""
    seq_len: int | None = None
    """Tokens of context; by default what the model allows, at most 1024."""
    batch_size: int = 8
    """Sequences in one forward pass."""
    dtype: ComputeDtype = "fp32"
    """Arithmetic of the forward pass."""
    out: str | None = None
    """File to write the result to, as JSON."""
    report: str | None = None
    """Directory to write report.html and report.png to."""

    def __post_init__(self) -> None:
        """Check that there is something to measure."""
        if not self.text and not self.tasks:
            raise ConfigError("nothing to measure: give --text FILE or --tasks NAME, or both")
        if not self.tasks and (self.task_data or self.task_path):
            raise ConfigError("--task-data and --task-path need the --tasks that they are for")
        if self.adapter is not None and self.bundle is None:
            raise ConfigError("--adapter needs the --bundle that it was trained against")
        check_least(self, 1, "batch_size", "task_limit")
        check_least(self, 0, "num_fewshot")


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateConfig:
    """Predict bytes, memory and time of a plan from the full model's config alone."""

    model: str
    """Directory of the full model (its config.json is enough), or its name on the hub."""
    plan: str
    """Split plan: '2-8-2', 'spread=4 keep=8', or 'adapter=0,1,30,31 emulator=2,5-9'."""
    select: str = "uniform"
    """Selection method for the kept blocks of a short plan."""
    blocks: str | None = None
    """Path of the block list in a model whose family is in no table, e.g. 'model.layers'."""
    gpus: int = 1
    """GPUs that distil, one for each Ray Train worker."""
    gpu_memory_gib: float = 80.0
    """Memory of a GPU."""
    headroom: float = 0.1
    """Share of it that stays free: for the CUDA context, NCCL and fragmentation."""
    batch_size: int = 8
    """Sequences in a step of distillation, over all GPUs."""
    micro_batch_size: int | None = None
    """Sequences in one forward pass of one GPU; by default its whole share of the batch."""
    seq_len: int = 512
    """Tokens in a sequence."""
    packed: bool = True
    """Several documents in a sequence, which attention keeps apart by a mask."""
    dtype: ComputeDtype = "bf16"
    """Arithmetic of the forward pass; what trains has float32 masters either way."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage (0 to 3) of distillation."""
    offload: Offload = "none"
    """What distillation keeps in host memory: optimizer state, or (stage 3) parameters too."""
    hidden_weight: float = 30.0
    """Weight of the error of the middle's output; this and the next decide what runs."""
    layerwise_weight: float = 0.0
    """Weight of the same error behind every emulator block."""
    logits_weight: float = 0.0
    """Weight of the KL divergence from the full model's next token."""
    lm_weight: float = 1.0
    """Weight of the language modelling cross-entropy."""
    teacher_cache: bool = False
    """Distil from the teacher's outputs on disk, without the full model in memory."""
    rank: int = 8
    """Rank of LoRA, width of a bottleneck adapter."""
    tokens: int = 10**9
    """Tokens to train on, for the time."""
    utilisation: float = 0.4
    """Share of the peak that training reaches, what is recomputed not counted (MFU)."""
    peak_tflops: float | None = None
    """Peak of one device in the arithmetic of the forward pass; for bf16 by default an A100's."""
    use_gpu: bool = True
    """Estimate for GPUs; otherwise for processes on the CPU."""

    def __post_init__(self) -> None:
        """Check ranges; raise :class:`ConfigError`."""
        check_least(self, 1, "gpus", "batch_size", "micro_batch_size", "rank", "tokens")
        check_least(self, 2, "seq_len")
        for name in ("gpu_memory_gib", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}={value} must be a positive number")
        if not 0 < self.utilisation <= 1:
            raise ConfigError(f"utilisation={self.utilisation} must be above 0 and at most 1")
        if not 0 <= self.headroom < 1:
            raise ConfigError(f"headroom={self.headroom} must be at least 0 and below 1")
        if self.zero_stage not in range(4):
            raise ConfigError(f"zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        if self.zero_stage < OFFLOAD_STAGES[self.offload]:
            raise ConfigError(
                f"offload={self.offload} needs zero_stage={OFFLOAD_STAGES[self.offload]} or more"
            )
        if self.batch_size % self.gpus:
            raise ConfigError(
                f"batch_size={self.batch_size} cannot be shared equally by {self.gpus} GPUs; "
                "make it a multiple"
            )
