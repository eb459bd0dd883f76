# SPDX-License-Identifier: Apache-2.0
"""The ways of fine-tuning that are compared, measured on one model."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.floor import (
    StepBytes,
    StepFlops,
    Work,
    step_bytes,
    step_flops,
    work_on_bundle,
    work_on_full_model,
)
from benchmarks.measure import PHASES, Job
from benchmarks.models import Shape, write_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
ITEMSIZE = {"fp32": 4, "bf16": 2}
"""Bytes of a number, by dtype."""
LORA_RANK = 8
"""The default of ``offsite-ray finetune``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How much is measured, and where."""

    device: str
    seq_len: int
    batch_size: int
    rounds: int
    """Processes for each way, in turn: a slow minute of the machine does not fall on one alone."""
    warmup: int
    """Steps of a process that are not counted."""
    steps: int
    """Steps that are."""

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.seq_len * self.batch_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A way of fine-tuning."""

    name: str
    title: str
    on_bundle: bool
    method: str

    def work(self, shape: Shape) -> Work:
        """Return what trains in what."""
        rank = LORA_RANK if self.method == "lora" else None
        return work_on_bundle(shape, rank) if self.on_bundle else work_on_full_model(shape, rank)


CASES = (
    Case(name="full", title="full fine-tuning", on_bundle=False, method="full"),
    Case(name="lora", title="LoRA on the full model", on_bundle=False, method="lora"),
    Case(name="offsite", title="offsite {plan}", on_bundle=True, method="full"),
    Case(name="offsite-lora", title="offsite {plan} + LoRA", on_bundle=True, method="lora"),
)
"""The first is what the others are compared with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A way of fine-tuning a model: what it took, and what it must take."""

    case: str
    title: str
    num_parameters: int
    num_trained: int
    tokens_per_s: float
    """By the median step."""
    phase_seconds: Mapping[str, float]
    """Median over the steps."""
    memory_bytes: int
    """Most in use by the median process, less what it used before there was a model."""
    flops: StepFlops
    flops_total: int
    bytes: StepBytes
    bytes_total: int
    rounds: tuple[Mapping[str, Any], ...]
    """What each process measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratios:
    """How many times better a way is than full fine-tuning, and could be."""

    throughput: float
    """Tokens per second."""
    throughput_floor: float
    """What the floating-point operations allow."""
    memory: float
    memory_floor: float
    """What the bytes allow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All ways of fine-tuning one model."""

    shape: Shape
    dtype: str
    """Of the stored model and of the arithmetic; what trains has float32 masters."""
    rows: tuple[Row, ...]
    """By :data:`CASES`."""
    ratios: tuple[Ratios, ...]
    """Of each row."""


def compare(shape: Shape, dtype: str, effort: Effort, scratch: str | None) -> Comparison:
    """Measure all ways of fine-tuning a model of random weights, written to ``scratch``."""
    rounds: dict[str, list[dict[str, Any]]] = {case.name: [] for case in CASES}
    with tempfile.TemporaryDirectory(prefix="bench-finetune-", dir=scratch) as directory:
        write_model(shape, dtype, f"{directory}/model", f"{directory}/bundle")
        for number in range(effort.rounds):
            for case in CASES:
                measured = _in_a_process(_job(case, dtype, effort, directory))
                rounds[case.name].append(measured)
                seconds = statistics.median(measured["step_seconds"])
                print(
                    f"{shape.name} {dtype} {case.name}, round {number + 1} of {effort.rounds}: "
                    f"{effort.tokens / seconds:.1f} tokens/s",
                    file=sys.stderr,
                )
    rows = tuple(_row(case, shape, dtype, effort, rounds[case.name]) for case in CASES)
    ratios = tuple(_ratios(rows[0], row) for row in rows)
    return Comparison(shape=shape, dtype=dtype, rows=rows, ratios=ratios)


def _job(case: Case, dtype: str, effort: Effort, directory: str) -> Job:
    return Job(
        directory=f"{directory}/{'bundle' if case.on_bundle else 'model'}",
        is_bundle=case.on_bundle,
        method=case.method,
        rank=LORA_RANK,
        seq_len=effort.seq_len,
        batch_size=effort.batch_size,
        dtype=dtype,
        device=effort.device,
        warmup=effort.warmup,
        steps=effort.steps,
    )


def _in_a_process(job: Job) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.measure", json.dumps(asdict(job))]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _row(
    case: Case, shape: Shape, dtype: str, effort: Effort, rounds: Sequence[Mapping[str, Any]]
) -> Row:
    work = case.work(shape)
    flops = step_flops(work, effort.seq_len, effort.batch_size)
    held = step_bytes(work, effort.seq_len, effort.batch_size, itemsize=ITEMSIZE[dtype])
    seconds = statistics.median(s for measured in rounds for s in measured["step_seconds"])
    phases = {
        phase: statistics.median(s for measured in rounds for s in measured["phase_seconds"][phase])
        for phase in PHASES
    }
    memory = statistics.median(m["peak_bytes"] - m["imported_bytes"] for m in rounds)
    return Row(
        case=case.name,
        title=case.title.format(plan=shape.plan),
        num_parameters=rounds[0]["num_parameters"],
        num_trained=rounds[0]["num_trained"],
        tokens_per_s=effort.tokens / seconds,
        phase_seconds=phases,
        memory_bytes=round(memory),
        flops=flops,
        flops_total=flops.total,
        bytes=held,
        bytes_total=held.total,
        rounds=tuple(rounds),
    )


def _ratios(full: Row, row: Row) -> Ratios:
    return Ratios(
        throughput=row.tokens_per_s / full.tokens_per_s,
        throughput_floor=full.flops_total / row.flops_total,
        memory=full.memory_bytes / row.memory_bytes,
        memory_floor=full.bytes_total / row.bytes_total,
    )
