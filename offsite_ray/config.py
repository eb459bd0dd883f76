# SPDX-License-Identifier: Apache-2.0
"""One frozen configuration per verb: the flags of the command line and the keys of its YAML.

A field is a flag: ``learning_rate`` is ``--learning-rate``. The string below a field is its help
text. Paths are text, so that a configuration can be written next to every result as it was given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from offsite_ray.errors import ConfigError

ComputeDtype = Literal["fp32", "bf16"]
"""Arithmetic of a forward pass; ``bf16`` is autocast, with float32 masters of what trains."""


Offload = Literal["none", "optimizer", "all"]
"""What is kept in host memory instead of a GPU's."""

OFFLOAD_STAGES = {"none": 0, "optimizer": 1, "all": 3}
"""What is offloaded to the lowest ZeRO stage that can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressConfig:
    """Make an emulator bundle out of a full model."""

    model: str
    """Directory of the full model."""
    plan: str
    """Split plan: '2-8-2', or 'adapter=0,1,30,31 emulator=2,5-9'."""
    out: str
    """Directory to write the emulator bundle to."""
    select: str = "uniform"
    """Selection method for the kept blocks of a short plan."""
    compress: str = "none"
    """Compression method for the kept blocks."""
    blocks: str | None = None
    """Path of the block list in a model whose family is in no table, e.g. 'model.layers'."""
    seed: int = 0
    """Seed of selection and compression methods that draw."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Tokenise text and pack it into blocks of equal length, as Parquet."""

    tokenizer: str
    """Directory of the tokenizer: a model or a bundle."""
    text: tuple[str, ...]
    """Files (.txt, .jsonl, .parquet), directories of them, or the name of a dataset."""
    out: str
    """Directory to write the prepared data to; like `text`, a path or a URI (s3://, gs://)."""
    block_size: int = 512
    """Tokens in a block."""
    seed: int | None = None
    """Seed of a random order of the documents; by default they stay as they are."""
    num_workers: int = 0
    """Ray Data workers; 0 prepares in this process, without Ray."""

    def __post_init__(self) -> None:
        """Check ranges; raise :class:`ConfigError`."""
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2**32")
        if self.num_workers < 0:
            raise ConfigError(f"num_workers={self.num_workers} must be 0 (no Ray) or more")


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
        counts = ("max_steps", "batch_size", "micro_batch_size", "eval_every", "checkpoint_every")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        for name in ("keep_best", "max_failures"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be 0 or more")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"weight_decay={self.weight_decay} must be 0 or a positive number")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be at least 0 and below 2**32")
        if self.seq_len is not None and self.seq_len < 2:
            raise ConfigError(f"seq_len={self.seq_len} must be at least 2")
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
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank} must be at least 1")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise ConfigError(f"lora_alpha={self.lora_alpha} must be a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateConfig:
    """Predict bytes, memory and time of a plan from the full model's config alone."""

    model: str
    """Directory of the full model (its config.json is enough), or its name on the hub."""
    plan: str
    """Split plan: '2-8-2', or 'adapter=0,1,30,31 emulator=2,5-9'."""
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
    """Share of the peak that training reaches."""
    peak_tflops: float | None = None
    """Peak of one device in the arithmetic of the forward pass; by default an A100's in bf16."""
    use_gpu: bool = True
    """Estimate for GPUs; otherwise for processes on the CPU."""

    def __post_init__(self) -> None:
        """Check ranges; raise :class:`ConfigError`."""
        for name in ("gpus", "batch_size", "micro_batch_size", "rank", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        for name in ("gpu_memory_gib", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}={value} must be a positive number")
        if not 0 < self.utilisation <= 1:
            raise ConfigError(f"utilisation={self.utilisation} must be above 0 and at most 1")
        if not 0 <= self.headroom < 1:
            raise ConfigError(f"headroom={self.headroom} must be at least 0 and below 1")
        if self.seq_len < 2:
            raise ConfigError(f"seq_len={self.seq_len} must be at least 2")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class PlugInConfig:
    """Put an adapter bundle into the full model."""

    model: str
    """Directory of the full model."""
    adapter: str
    """Adapter bundle that came back from the data owner."""
    out: str
    """Directory to write the plugged-in model to."""
    verbose: bool = False
    """Print a line for each replaced tensor."""


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
        for name, least in (("batch_size", 1), ("task_limit", 1), ("num_fewshot", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value} must be at least {least}")


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """Say what is in a bundle, an adapter, a plugged-in model or a full model."""

    path: str
    """Directory to look into."""
    blocks: str | None = None
    """Path of the block list in a full model whose family is in no table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Check that a bundle is whole and unaltered."""

    path: str
    """Directory to check."""
    model: str | None = None
    """Full model that the bundle must belong to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Run the whole loop on this machine, without downloads."""

    out: str = "demo-out"
    """Directory for every artefact and the report."""
    foundation: str | None = None
    """Full model to use; by default the one under examples/foundation/."""
    scale: float = 1.0
    """Share of the training steps to run; below 1 is quick and shows less."""
