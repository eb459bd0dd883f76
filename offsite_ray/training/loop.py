# SPDX-License-Identifier: Apache-2.0
"""The one training loop.

A step's loss is a sum over the whole global batch divided by a count over the whole global batch
(its target tokens, or its sequences). Every worker knows that batch, because the order of the data
is a function of the seed and the step alone; so the loss and the gradient are the same for any
number of workers and any size of micro-batch, and a resumed run sees the data it would have seen.
No dropout anywhere, for the same reason.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from offsite_ray.errors import DivergedError
from offsite_ray.results import EvalRecord, RunStart, StepRecord, TrainingHistory
from offsite_ray.training.batches import collate, num_targets
from offsite_ray.training.devices import peak_memory, peak_tflops
from offsite_ray.training.mirror import Mirror
from offsite_ray.training.prefetch import Prefetched
from offsite_ray.training.progress import Progress, identity_of
from offsite_ray.training.schedule import Schedule, schedule

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from offsite_ray.config import TrainingConfig
    from offsite_ray.results import Report
    from offsite_ray.training.protocols import Engine, TokenDataset, TrainingTask

_MAX_EVAL_ROWS = 256
"""Held-out sequences of an evaluation, at most."""


def training_loop(
    task: TrainingTask, engine: Engine, config: TrainingConfig, run_dir: Path, report: Report
) -> TrainingHistory:
    """Train; called by every worker with the same arguments and its own engine.

    Goes on from the last checkpoint in ``run_dir``, if there is one.

    Raises:
        DivergedError: The loss or the gradient is not a number.
        ResumeError: A checkpoint is of another run, or damaged.
        StorageError: A checkpoint cannot be written.
    """
    train, held_out = task.datasets()
    plan = schedule(config, len(train))
    identity = identity_of(task, config, plan)
    mirror = Mirror.beside(getattr(config, "out", None))
    progress = Progress(run_dir, engine, report, identity, _num_best(config), mirror)
    first = progress.resume()
    progress.tell(
        RunStart(
            total_steps=plan.total_steps,
            first_step=first,
            num_train=len(train),
            num_held_out=len(held_out),
            earlier=progress.earlier,
        )
    )
    start = time.perf_counter()
    try:
        if first == 0:
            progress.add(evaluate_loss(task, engine, config, held_out, 0))
        with Prefetched(train) as rows:
            for step in range(first, plan.total_steps):
                for near in range(step, min(step + 2, plan.total_steps)):
                    rows.ahead(plan.rows(near, engine.rank, engine.world_size))
                progress.add(train_step(task, engine, config, plan, rows, step, progress))
                done = step + 1
                if plan.evaluates(done):
                    progress.add(evaluate_loss(task, engine, config, held_out, done))
                if plan.checkpoints(done):
                    progress.checkpoint(done, time.perf_counter() - start)
        progress.settle()
    except DivergedError:  # on every worker at once
        progress.diverged()
        raise
    except BaseException:
        progress.stop()
        raise
    step = plan.total_steps
    if config.result == "best":
        best = progress.best(progress.evaluations[-1].losses["loss"])
        if best is not None:
            progress.load(best)
            step = best.step
    tokens = len(progress.steps) * plan.batch_size * train[0]["input_ids"].numel()
    history = progress.history(time.perf_counter() - start)
    return replace(history, num_tokens=tokens, result_step=step)


def _num_best(config: TrainingConfig) -> int:
    return max(config.keep_best, 1 if config.result == "best" else 0)


def train_step(
    task: TrainingTask,
    engine: Engine,
    config: TrainingConfig,
    plan: Schedule,
    train: TokenDataset,
    step: int,
    progress: Progress | None = None,
) -> StepRecord:
    """Do one optimizer step over the global batch of ``step``.

    Raises:
        DivergedError: Its loss or its gradient is not a number.
        StorageError: A worker could not write its part of a checkpoint meanwhile.
    """
    start = time.perf_counter()
    own = [train[row] for row in plan.rows(step, engine.rank, engine.world_size)]
    tokens, sequences = engine.reduce([num_targets(own), len(own)])
    counts = {"token": max(1.0, tokens), "sequence": sequences}
    size = config.micro_batch_size or len(own)
    sums: dict[str, Tensor | float] = dict.fromkeys(task.loss_weights, 0.0)
    for begin in range(0, len(own), size):
        parts = engine.forward(collate(own[begin : begin + size], engine.device))
        loss = sum(
            (weight * parts[name] / counts[task.loss_units[name]])
            for name, weight in task.loss_weights.items()
        )
        engine.backward(loss)  # type: ignore[arg-type]
        for name in sums:
            # Stays on the device: a GPU is only waited for once a step.
            sums[name] = sums[name] + parts[name].detach().double()
    *totals, failed = engine.reduce(
        [*map(float, sums.values()), progress.failed if progress else 0]
    )
    if progress is not None and failed:
        progress.raise_failure()
    losses = _mean_losses(task, dict(zip(sums, totals, strict=True)), counts)
    check_finite(f"the loss of step {step + 1}", losses["loss"])
    rate = plan.learning_rate(step)
    norm = engine.step(rate)
    if norm is not None:
        # Each engine treats such a gradient in its own way; none of them leads on.
        check_finite(f"the gradient norm of step {step + 1}", norm)
    seconds = time.perf_counter() - start
    num_tokens = plan.batch_size * own[0]["input_ids"].numel()
    return StepRecord(
        step=step + 1,
        losses=losses,
        learning_rate=rate,
        grad_norm=norm,
        tokens_per_s=num_tokens / seconds,
        flops_utilisation=utilisation(task, config, engine, num_tokens / seconds),
        peak_memory_bytes=peak_memory(engine.device),
    )


@torch.no_grad()
def evaluate_loss(
    task: TrainingTask, engine: Engine, config: TrainingConfig, held_out: TokenDataset, step: int
) -> EvalRecord:
    """Return the mean losses on held-out rows, which the workers share.

    Every worker does the same forward passes on batches of the same shape, as ZeRO-3 needs: a
    worker without a last row takes the first and counts it as nothing.
    """
    rows = range(min(len(held_out), _MAX_EVAL_ROWS))
    own = list(rows)[engine.rank :: engine.world_size]
    whole = len(rows) // engine.world_size
    size = config.micro_batch_size or max(1, config.batch_size // engine.world_size)
    batches = [own[begin : min(begin + size, whole)] for begin in range(0, whole, size)]
    if len(rows) % engine.world_size:
        batches.append(own[whole:])
    sums: dict[str, float] = {}
    tokens = sequences = 0
    for chosen in ([held_out[row] for row in batch] for batch in batches):
        parts = engine.forward(collate(chosen or [held_out[0]], engine.device))
        tokens += num_targets(chosen)
        sequences += len(chosen)
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + (float(part) if chosen else 0.0)
    names = sorted(sums)
    totals = engine.reduce([tokens, sequences, *(sums[name] for name in names)])
    counts = {"token": max(1.0, totals[0]), "sequence": max(1.0, totals[1])}
    found = dict(zip(names, totals[2:], strict=True))
    losses = _mean_losses(task, found, counts)
    check_finite("the held-out loss", losses["loss"])
    beside = {n: total / counts["sequence"] for n, total in found.items() if n not in losses}
    return EvalRecord(step=step, losses=losses, diagnostics=beside)


def check_finite(what: str, value: float) -> None:
    """Refuse to go on with what is not a number; raise :class:`DivergedError`."""
    if not math.isfinite(value):
        raise DivergedError(
            f"{what} is {value}; try a lower --learning-rate (with --resume from the "
            "last checkpoint, if there is one), or --dtype fp32"
        )


def utilisation(
    task: TrainingTask, config: TrainingConfig, engine: Engine, tokens_per_s: float
) -> float | None:
    """Return the share of the devices' peak that the model's own arithmetic takes, if known."""
    peak = config.peak_tflops or peak_tflops(engine.device)
    flops = task.flops_per_token
    if peak is None or flops is None:
        return None
    return flops * tokens_per_s / (peak * 1e12 * engine.world_size)


def _mean_losses(
    task: TrainingTask, totals: Mapping[str, float], counts: Mapping[str, float]
) -> dict[str, float]:
    means = {name: totals[name] / counts[task.loss_units[name]] for name in task.loss_weights}
    return {**means, "loss": sum(task.loss_weights[name] * means[name] for name in means)}
