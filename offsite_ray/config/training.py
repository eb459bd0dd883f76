# SPDX-License-Identifier: Apache-2.0
"""Configurations of the verbs that train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from offsite_ray.config.ranges import check_least
from offsite_ray.errors import ConfigError

ComputeDtype = Literal["fp32", "bf16"]
"""Arithmetic of a forward pass; ``bf16`` is autocast, with float32 masters of what trains."""


Offload = Literal["none", "optimizer", "all"]
"""What is kept in host memory instead of a GPU's."""

OFFLOAD_STAGES = {"none": 0, "optimizer": 1, "all": 3}
"""What is offloaded to the lowest ZeRO stage that can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The knobs that every training verb shares."""

    max_steps: int | None = None
    """Optimizer steps; by default as many as `epochs` hold."""
    epochs: float = 1.0
    """Passes over the data, where `max_steps` is not given."""
    batch_size: int = 8
    """Sequences in an optimizer step, over all workers."""
    micro_batch_size: int | None = None
    """Sequences in one forward pass of one worker; by default its whole share of the batch."""
    seq_len: int | None = None
    """Tokens in a sequence; by default what the data or the model gives (at most 1024)."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; vectors are never decayed."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises, before it follows a cosine to zero."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    dtype: ComputeDtype = "fp32"
    """Arithmetic of the forward pass; what trains has float32 masters either way."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    eval_every: int | None = None
    """Steps between evaluations on held-out data; by default a tenth of the run."""
    eval_fraction: float = 0.02
    """Share of the data held out for these evaluations (at least one sequence)."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; by default a quarter of the run."""
    keep_best: int = 0
    """Checkpoints to keep beside the last one: those with the lowest held-out loss."""
    result: Literal["last", "best"] = "last"
    """Which state is written: that of the last step, or of the best checkpoint if it is better."""
    seed: int = 0
    """Seed of the data order and of every initialisation."""
    num_workers: int = 0
    """Ray Train workers; 0 trains in this process, without Ray."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage (0 to 3) of the Ray Train workers."""
    offload: Offload = "none"
    """What Ray Train workers keep in host memory: optimizer state, or (stage 3) parameters too."""
    use_gpu: bool | None = None
    """One GPU for each worker; by default if there is one."""
    max_failures: int = 3
    """Times that lost Ray Train workers are started again, from the last checkpoint."""
    resume: bool = False
    """Go on from the last checkpoint of a run that was stopped, if there is one."""
    log_dir: str | None = None
    """Directory for metrics.jsonl and TensorBoard's files; by default nothing is logged."""
    report_to: tuple[str, ...] = ()
    """Also report metrics to wandb or mlflow, if installed."""
    peak_tflops: float | None = None
    """Peak of one device, for the utilisation; by default known for common GPUs."""

    def __post_init__(self) -> None:
        """Check ranges that hold for every training verb; raise :class:`ConfigError`."""
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}={value} must be a positive number")
        check_least(self, 1, "max_steps", "batch_size", "micro_batch_size")
        check_least(self, 1, "eval_every", "checkpoint_every")
        check_least(self, 0, "keep_best", "max_failures")
        check_least(self, 2, "seq_len")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"weight_decay={self.weight_decay} must be 0 or a positive number")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2**32")
        for name in ("warmup_fraction", "eval_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.num_workers < 0:
            raise ConfigError(f"num_workers={self.num_workers} must be 0 (no Ray) or more")
        if self.zero_stage not in range(4):
            raise ConfigError(f"zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        if self.zero_stage and not self.num_workers:
            raise ConfigError(
                f"zero_stage={self.zero_stage} needs Ray Train workers; give --num-workers N"
            )
        if self.offload != "none" and self.zero_stage < OFFLOAD_STAGES[self.offload]:
            raise ConfigError(
                f"offload={self.offload} needs zero_stage={OFFLOAD_STAGES[self.offload]} or more"
            )
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ConfigError(f"peak_tflops={self.peak_tflops} must be a positive number")
        if self.batch_size % max(1, self.num_workers):
            raise ConfigError(
                f"batch_size={self.batch_size} cannot be shared equally by "
                f"{self.num_workers} workers; make it a multiple"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig(TrainingConfig):
    """Train the emulator blocks of a bundle to stand in for the middle of the full model."""

    model: str
    """Directory of the full model."""
    bundle: str
    """Emulator bundle to start from."""
    data: tuple[str, ...]
    """Public text: prepared data, files, or the name of a dataset."""
    out: str
    """Directory to write the distilled emulator bundle to."""
    hidden_weight: float = 30.0
    """Weight of the RMS-normalised error of the middle's output (the paper's 30)."""
    layerwise_weight: float = 0.0
    """Weight of the same error behind every emulator block, against the block it stands up to."""
    logits_weight: float = 0.0
    """Weight of the KL divergence of the emulator model's next token from the full model's."""
    lm_weight: float = 1.0
    """Weight of the language modelling cross-entropy (the paper's 1)."""
    temperature: float = 1.0
    """Temperature of both sides of the KL divergence."""
    teacher_cache: str | None = None
    """Directory of the teacher's outputs on the data: used if it is there, else written first."""
    compile: bool = False
    """Compile each block with torch.compile: a minute at the start, faster steps after it."""
    dry_run: bool = False
    """Say what would run and what it would take; read no weight and train nothing."""
    num_workers: int = 1
    """Ray Train workers."""

    def __post_init__(self) -> None:
        """Check that there is a loss to go down."""
        # Zero-argument super() does not work in a dataclass with slots: the class is made twice.
        TrainingConfig.__post_init__(self)
        names = ("hidden_weight", "layerwise_weight", "logits_weight", "lm_weight")
        for name in names:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name}={getattr(self, name)} must be 0 or a positive number")
        if not any(getattr(self, name) for name in names):
            raise ConfigError(f"{', '.join(names)} are all 0; give one of them a weight")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature={self.temperature} must be a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(TrainingConfig):
    """Train the adapter blocks of a bundle, or a full model as the baseline."""

    bundle: str | None = None
    """Emulator bundle whose adapter blocks are trained (the data owner's case)."""
    model: str | None = None
    """Full model to train whole, as the baseline (instead of `bundle`)."""
    data: tuple[str, ...]
    """Text: files (.txt, .jsonl, .parquet) or the name of a dataset."""
    out: str
    """Directory to write the adapter bundle (or the fine-tuned model) to."""
    method: str = "full"
    """Fine-tuning method: full, lora, bottleneck or bitfit."""
    rank: int = 8
    """Rank of LoRA, width of a bottleneck adapter."""
    lora_alpha: float = 16.0
    """LoRA's scale is `lora_alpha / rank`."""
    blocks: str | None = None
    """Path of the block list in a `model` whose family is in no table; a bundle knows its own."""

    def __post_init__(self) -> None:
        """Check that there is exactly one thing to train."""
        TrainingConfig.__post_init__(self)
        if (self.bundle is None) == (self.model is None):
            raise ConfigError("give either --bundle (adapter blocks) or --model (the baseline)")
        if self.bundle is not None and self.blocks is not None:
            raise ConfigError(f"blocks={self.blocks!r} goes with --model: a bundle knows its own")
        check_least(self, 1, "rank")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise ConfigError(f"lora_alpha={self.lora_alpha} must be a positive number")
