# SPDX-License-Identifier: Apache-2.0
"""One way of fine-tuning, measured in a process of its own: time by phase, and memory.

    python -m benchmarks.measure '{"directory": ...}'     a Job as JSON; prints a Measured as JSON

Everything that runs is the library's own: the task that ``finetune`` builds, its engine with a
clock around each call, and a step of its loop. Only the rows are made up, each one document.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from benchmarks.memory import memory
from offsite_ray.architectures import load_config, model_class
from offsite_ray.config import FinetuneConfig
from offsite_ray.data import PreparedData, TokenBlocks
from offsite_ray.emulator import open_bundle, open_full_model
from offsite_ray.finetuning.host import host_of_bundle, host_of_full_model
from offsite_ray.finetuning.run import FinetuneTask
from offsite_ray.results import to_plain
from offsite_ray.training.engine import TorchEngine
from offsite_ray.training.loop import train_step
from offsite_ray.training.schedule import schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

PHASES = ("data", "forward", "backward", "optimizer")
"""``data`` is all that is none of the others: rows, the sum of the losses, the record."""

NUM_ROWS = 16
_FIRST_TOKEN = 4
"""Those before have a meaning of their own, e.g. padding."""

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to measure."""

    directory: str
    """Of the full model or of the bundle."""
    is_bundle: bool
    method: str
    rank: int
    """Of LoRA."""
    seq_len: int
    batch_size: int
    dtype: str
    device: str
    warmup: int
    """Steps before the measured ones: the first reads the weights and makes optimizer state."""
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one process measured."""

    num_parameters: int
    num_trained: int
    num_threads: int
    build_seconds: float
    """Opening and loading the model, and making the optimizer."""
    step_seconds: tuple[float, ...]
    phase_seconds: Mapping[str, tuple[float, ...]]
    """Of each step, by :data:`PHASES`."""
    losses: tuple[float, ...]
    """Of each step, those of the warm-up too."""
    imported_bytes: int
    """In use before there was a model."""
    peak_bytes: int
    """Most in use, ever: resident in this process, or allocated on the GPU."""


class RandomRows(FinetuneTask):
    """A fine-tuning task on random tokens."""

    def datasets(self) -> tuple[TokenBlocks, TokenBlocks]:
        """Return rows of one document each."""
        return random_rows(self.model, self.data, self.config.seed)


def random_rows(model: str, data: PreparedData, seed: int) -> tuple[TokenBlocks, TokenBlocks]:
    """Return rows of random tokens, one document each, and one of them as held out."""
    shape = (data.num_blocks, data.block_size)
    vocab = load_config(model).vocab_size
    draw = np.random.default_rng(seed)
    tokens = draw.integers(_FIRST_TOKEN, vocab, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    blocks = [
        {"input_ids": row, "labels": row, "position_ids": place}
        for row, place in zip(tokens, positions, strict=True)
    ]
    return TokenBlocks(blocks, range(shape[0])), TokenBlocks(blocks, [0])


class TimedEngine(TorchEngine):
    """The engine of this process, with a clock around each of its calls."""

    def __init__(self, task: RandomRows, config: FinetuneConfig) -> None:
        """Build the task's module and its optimizer."""
        super().__init__(task, config)
        self.seconds = dict.fromkeys(PHASES[1:], 0.0)
        parameters = list(self._module.parameters())
        self.num_parameters = sum(p.numel() for p in parameters)
        self.num_trained = sum(p.numel() for p in parameters if p.requires_grad)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the parts of the loss."""
        return self._timed("forward", lambda: super(TimedEngine, self).forward(batch))

    def backward(self, loss: Tensor) -> None:
        """Add the gradient."""
        self._timed("backward", lambda: super(TimedEngine, self).backward(loss))

    def step(self, learning_rate: float) -> float:
        """Clip and apply the gradient."""
        return self._timed("optimizer", lambda: super(TimedEngine, self).step(learning_rate))

    def _timed(self, phase: str, call: Callable[[], _Value]) -> _Value:
        start = time.perf_counter()
        value = call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start
        return value


def measure(job: Job) -> Measured:
    """Train for some steps and say what it took."""
    device = torch.device(job.device)
    import_everything(job)
    imported = memory(device, peak=False)
    start = time.perf_counter()
    task = task_of(job)
    engine = TimedEngine(task, task.config)
    build_seconds = time.perf_counter() - start
    steps, losses = _run(engine, task)
    measured = steps[job.warmup :]
    return Measured(
        num_parameters=engine.num_parameters,
        num_trained=engine.num_trained,
        num_threads=torch.get_num_threads(),
        build_seconds=build_seconds,
        step_seconds=tuple(sum(step.values()) for step in measured),
        phase_seconds={phase: tuple(step[phase] for step in measured) for phase in PHASES},
        losses=tuple(losses),
        imported_bytes=imported,
        peak_bytes=memory(device, peak=True),
    )


def import_everything(job: Job) -> None:
    """Import what the task would import late, so that it counts as program and not as model."""
    import peft  # noqa: F401

    model_class(load_config(job.directory))


def task_of(job: Job) -> RandomRows:
    """Return the task that ``offsite-ray finetune`` would make, with random rows."""
    host = (
        host_of_bundle(open_bundle(job.directory))
        if job.is_bundle
        else host_of_full_model(open_full_model(job.directory))
    )
    whole = not job.is_bundle and job.method == "full"
    config = FinetuneConfig(
        bundle=job.directory if job.is_bundle else None,
        model=None if job.is_bundle else job.directory,
        data=("random tokens",),
        out="nothing is written",
        method=job.method,
        rank=job.rank,
        dtype="bf16" if job.dtype == "bf16" else "fp32",
        seq_len=job.seq_len,
        batch_size=job.batch_size,
        max_steps=job.warmup + job.steps,
        use_gpu=job.device == "cuda",
    )
    return RandomRows(
        model=str(host.path),
        model_id="benchmark",
        blocks=None,
        indices=None if whole else tuple(host.positions.values()),
        config=config,
        data=PreparedData(
            path=host.path, block_size=job.seq_len, num_blocks=NUM_ROWS, tokenizer="none"
        ),
        use_positions=True,
    )


def _run(engine: TimedEngine, task: RandomRows) -> tuple[list[dict[str, float]], list[float]]:
    """Return seconds by phase, and the loss, of each step."""
    train, _ = task.datasets()
    plan = schedule(task.config, len(train))
    steps, losses = [], []
    for step in range(plan.total_steps):
        engine.seconds = dict.fromkeys(PHASES[1:], 0.0)
        start = time.perf_counter()
        record = train_step(task, engine, task.config, plan, train, step)
        total = time.perf_counter() - start
        steps.append({"data": total - sum(engine.seconds.values()), **engine.seconds})
        losses.append(record.losses["loss"])
    return steps, losses


if __name__ == "__main__":
    print(json.dumps(to_plain(measure(Job(**json.loads(sys.argv[1]))))))
