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
from offsite_ray.training.progress import Progress, identity_of
from offsite_ray.training.schedule import Schedule, schedule

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from offsite_ray.config import TrainingConfig
    from offsite_ray.training.protocols import Engine, Report, TokenDataset, TrainingTask

_MAX_EVAL_ROWS = 256
"""Held-out sequences of an evaluation, at most."""


def training_loop(
    task: TrainingTask, engine: Engine, config: TrainingConfig, run_dir: Path, report: Report
) -> TrainingHistory:
    """Train; called by every worker with the same arguments and its own engine.

    Raises:
        DivergedError: The loss is not a number.
        ResumeError: A checkpoint is of another run.
    """
    train, held_out = task.datasets()
    plan = schedule(config, len(train))
    progress = Progress(run_dir, engine, report, identity_of(task, config, plan))
    first = progress.resume() if config.resume else 0
    report(
        RunStart(
            total_steps=plan.total_steps,
            first_step=first,
            num_train=len(train),
            num_held_out=len(held_out),
        )
    )
    start = time.perf_counter()
    if first == 0:
        progress.add(EvalRecord(step=0, losses=evaluate_loss(task, engine, config, held_out)))
    for step in range(first, plan.total_steps):
        progress.add(train_step(task, engine, config, plan, train, step))
        done = step + 1
        if done % plan.eval_every == 0 or done == plan.total_steps:
            losses = evaluate_loss(task, engine, config, held_out)
            progress.add(EvalRecord(step=done, losses=losses))
        if done % plan.checkpoint_every == 0 and done < plan.total_steps:
            progress.checkpoint(done, time.perf_counter() - start)
    tokens = len(progress.steps) * plan.batch_size * train[0]["input_ids"].numel()
    return replace(progress.history(time.perf_counter() - start), num_tokens=tokens)


def train_step(
    task: TrainingTask,
    engine: Engine,
    config: TrainingConfig,
    plan: Schedule,
    train: TokenDataset,
    step: int,
) -> StepRecord:
    """Do one optimizer step over the global batch of ``step``."""
    start = time.perf_counter()
    batch = [train[row] for row in plan.rows(step)]
    counts = {"token": max(1, num_targets(batch)), "sequence": len(batch)}
    own = batch[engine.rank :: engine.world_size]
    size = config.micro_batch_size or len(own)
    sums = dict.fromkeys(task.loss_weights, 0.0)
    for begin in range(0, len(own), size):
        parts = engine.forward(collate(own[begin : begin + size], engine.device))
        loss = sum(
            (weight * parts[name] / counts[task.loss_units[name]])
            for name, weight in task.loss_weights.items()
        )
        engine.backward(loss)  # type: ignore[arg-type]
        for name in sums:
            sums[name] += float(parts[name].detach())
    losses = _mean_losses(task, engine, sums, counts)
    check_finite(f"the loss of step {step + 1}", losses)
    rate = plan.learning_rate(step)
    norm = engine.step(rate)
    tokens = sum(row["input_ids"].numel() for row in batch)
    return StepRecord(
        step=step + 1,
        losses=losses,
        learning_rate=rate,
        grad_norm=norm,
        tokens_per_s=tokens / (time.perf_counter() - start),
    )


@torch.no_grad()
def evaluate_loss(
    task: TrainingTask, engine: Engine, config: TrainingConfig, held_out: TokenDataset
) -> dict[str, float]:
    """Return the mean losses on held-out rows, which the workers share.

    Every worker does the same number of forward passes, as ZeRO-3 needs; one without a row left
    takes the first and counts it as nothing.
    """
    rows = range(min(len(held_out), _MAX_EVAL_ROWS))
    own = list(rows)[engine.rank :: engine.world_size]
    most = math.ceil(len(rows) / engine.world_size)
    size = config.micro_batch_size or max(1, config.batch_size // engine.world_size)
    sums = dict.fromkeys(task.loss_weights, 0.0)
    tokens = sequences = 0
    for begin in range(0, most, size):
        chosen = [held_out[row] for row in own[begin : begin + size]]
        parts = engine.forward(collate(chosen or [held_out[0]], engine.device))
        if not chosen:
            continue
        tokens += num_targets(chosen)
        sequences += len(chosen)
        for name in sums:
            sums[name] += float(parts[name])
    tokens, sequences = (int(n) for n in engine.reduce([tokens, sequences]))
    counts = {"token": max(1, tokens), "sequence": max(1, sequences)}
    losses = _mean_losses(task, engine, sums, counts)
    check_finite("the held-out loss", losses)
    return losses


def check_finite(what: str, losses: Mapping[str, float]) -> None:
    """Refuse to go on with a loss that is not a number; raise :class:`DivergedError`."""
    if not math.isfinite(losses["loss"]):
        raise DivergedError(
            f"{what} is {losses['loss']}; try a lower --learning-rate, or --dtype fp32"
        )


def _mean_losses(
    task: TrainingTask, engine: Engine, sums: Mapping[str, float], counts: Mapping[str, int]
) -> dict[str, float]:
    names = list(task.loss_weights)
    totals = engine.reduce([sums[name] for name in names])
    means = {
        name: total / counts[task.loss_units[name]]
        for name, total in zip(names, totals, strict=True)
    }
    return {**means, "loss": sum(task.loss_weights[name] * means[name] for name in names)}
