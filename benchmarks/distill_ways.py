# SPDX-License-Identifier: Apache-2.0
"""One way of distilling, measured in a process of its own: time of each step, and memory.

    python -m benchmarks.distill_ways '{"directory": ...}'    a Job as JSON; prints JSON

``shared``, ``here`` and ``ray`` are the library's: the task that ``distill`` builds, and its loop.
``bare`` is the task's module in a plain loop of torch. ``plain`` is what one would write without
the library: a stock student with its head and a stock teacher beside it, in the same plain loop.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.measure import NUM_ROWS, random_rows
from benchmarks.memory import memory
from offsite_ray.architectures import load_config, load_model, model_class
from offsite_ray.config import DistillConfig
from offsite_ray.data import PreparedData
from offsite_ray.distillation.losses import forward_divergence, normalized_error
from offsite_ray.distillation.task import DistillTask
from offsite_ray.emulator import open_bundle
from offsite_ray.results import to_plain
from offsite_ray.training import adamw, run_here
from offsite_ray.training.batches import collate, num_targets, sum_cross_entropy
from offsite_ray.training.engine import TorchEngine
from offsite_ray.training.head import next_tokens
from offsite_ray.training.loop import train_step
from offsite_ray.training.schedule import schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from offsite_ray.data import TokenBlocks

WEIGHTS: dict[str, dict[str, float]] = {
    "30 hidden + lm": {"hidden_weight": 30.0, "lm_weight": 1.0},
    "hidden": {"hidden_weight": 1.0, "lm_weight": 0.0},
    "logits": {"hidden_weight": 0.0, "lm_weight": 0.0, "logits_weight": 1.0},
}
"""Losses that are measured: the paper's, one that needs no head, one that needs both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to measure."""

    directory: str
    """Of a folder with ``model`` and ``bundle``."""
    way: str
    """A name in :data:`WAYS`."""
    loss: str
    """A name in :data:`WEIGHTS`."""
    seq_len: int
    batch_size: int
    dtype: str
    device: str
    warmup: int
    """Steps before the measured ones."""
    steps: int
    num_workers: int = 0
    zero_stage: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """A worker's clocks, and its memory, when a forward pass of training begins."""

    seconds: float
    cpu_seconds: float
    """Of all threads of the process."""
    thread_seconds: float
    """Processor time of the thread that trains alone."""
    peak_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one process, or one worker, measured."""

    num_threads: int
    step_seconds: tuple[float, ...]
    """From one step's forward pass to the next one's, without the warm-up's."""
    step_cpu_seconds: tuple[float, ...]
    step_thread_seconds: tuple[float, ...]
    imported_bytes: int
    """In use before there was a model."""
    peak_bytes: int


class Clock:
    """A file to which a module writes its stamps, one for each forward pass of training."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Begin with the memory that is in use before there is a model."""
        self._path = path
        self._device = device
        self._write({"threads": torch.get_num_threads(), "imported": memory(device, peak=False)})

    def watch(self, module: nn.Module) -> None:
        """Stamp each forward pass of a module that has gradients."""
        module.register_forward_pre_hook(
            lambda *_: self.stamp() if torch.is_grad_enabled() else None
        )

    def stamp(self) -> None:
        """Write the clocks as they are now."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        stamp = Stamp(
            seconds=time.perf_counter(),
            cpu_seconds=time.process_time(),
            thread_seconds=time.thread_time(),
            peak_bytes=memory(self._device, peak=True),
        )
        self._write(to_plain(stamp))

    def _write(self, values: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(values) + "\n")


def read_clock(path: Path, warmup: int) -> Measured:
    """Return what a clock has written."""
    first, *lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    stamps = [Stamp(**line) for line in lines][warmup:]
    pairs = list(itertools.pairwise(stamps))
    return Measured(
        num_threads=first["threads"],
        step_seconds=tuple(b.seconds - a.seconds for a, b in pairs),
        step_cpu_seconds=tuple(b.cpu_seconds - a.cpu_seconds for a, b in pairs),
        step_thread_seconds=tuple(b.thread_seconds - a.thread_seconds for a, b in pairs),
        imported_bytes=first["imported"],
        peak_bytes=stamps[-1].peak_bytes,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedTask(DistillTask):
    """The task that ``offsite-ray distill`` would make, with random rows and a clock."""

    clocks: str
    """Directory for the clock of each worker."""

    def build(self, device: torch.device) -> nn.Module:
        """Return the module, watched."""
        import_everything(self.model)
        clock = Clock(Path(self.clocks) / os.environ.get("RANK", "0"), device)
        module = DistillTask.build(self, device)
        clock.watch(module)
        return module

    def datasets(self) -> tuple[TokenBlocks, TokenBlocks]:
        """Return random rows."""
        return random_rows(self.model, self.data, self.config.seed)


class PlainTask(TimedTask):
    """A stock student with its head, and a stock teacher beside it."""

    def build(self, device: torch.device) -> nn.Module:
        """Return both in one module."""
        import_everything(self.model)
        clock = Clock(Path(self.clocks) / "0", device)
        dtype = torch.bfloat16 if self.config.dtype == "bf16" else torch.float32
        teacher = load_model(self.model, dtype=dtype, dropout=False).requires_grad_(False)
        student = load_model(self.bundle, dtype=dtype, dropout=False).requires_grad_(False)
        module = PlainDistillation(teacher, student, self)
        clock.watch(module)
        return module.to(device)


class PlainDistillation(nn.Module):
    """Two stock models, each run whole."""

    def __init__(self, teacher: Any, student: Any, task: PlainTask) -> None:
        """Let the student's emulator blocks train, as float32."""
        super().__init__()
        self.teacher, self.student = teacher, student
        self._names = tuple(task.loss_weights)
        self._end = (max(task.plan.middle) + 1, task.plan.kept.index(max(task.plan.emulator)) + 1)
        for index in task.plan.emulator:
            block = student.get_decoder().layers[task.plan.kept.index(index)]
            block.float().requires_grad_(True)

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Tensor) -> dict[str, Tensor]:
        """Return the parts of the loss, summed over ``(B, T)``."""
        with torch.no_grad():
            teacher = self.teacher(input_ids, use_cache=False, output_hidden_states=True)
        student = self.student(input_ids, use_cache=False, output_hidden_states=True)
        behind, own = self._end
        parts: dict[str, Callable[[], Tensor]] = {
            "hidden": lambda: normalized_error(
                student.hidden_states[own], teacher.hidden_states[behind]
            ),
            "lm": lambda: sum_cross_entropy(student.logits, labels),
            "logits": lambda: forward_divergence(
                student.logits.float().flatten(0, 1),
                teacher.logits.float().flatten(0, 1),
                next_tokens(labels).flatten(),
                1.0,
            ),
        }
        return {name: parts[name]() for name in self._names}


def import_everything(model: str) -> None:
    """Import what is imported late otherwise, so that it counts as program and not as model."""
    model_class(load_config(model))


def task_of(job: Job, clocks: Path) -> TimedTask:
    """Return what is measured."""
    model, bundle = f"{job.directory}/model", open_bundle(f"{job.directory}/bundle")
    weights: dict[str, Any] = WEIGHTS[job.loss]
    config = DistillConfig(
        model=model,
        bundle=str(bundle.path),
        data=("random tokens",),
        out="nothing is written",
        dtype="bf16" if job.dtype == "bf16" else "fp32",
        batch_size=job.batch_size,
        max_steps=job.warmup + job.steps + 1,
        eval_every=10**9,
        checkpoint_every=10**9,
        num_workers=job.num_workers,
        zero_stage=job.zero_stage,
        use_gpu=job.device == "cuda",
        **weights,
    )
    data = PreparedData(
        path=bundle.path, block_size=job.seq_len, num_blocks=NUM_ROWS, tokenizer="none"
    )
    kind = PlainTask if job.way == "plain" else TimedTask
    return kind(
        model=model,
        bundle=str(bundle.path),
        bundle_id=bundle.manifest.id,
        plan=bundle.plan,
        blocks=None,
        config=config,
        data=data,
        use_positions=True,
        clocks=str(clocks),
    )


def _steps_of_the_library(task: TimedTask, _run_dir: Path) -> None:
    """Run steps of the loop, without its evaluations."""
    engine = TorchEngine(task, task.config)
    train, _ = task.datasets()
    plan = schedule(task.config, len(train))
    for step in range(plan.total_steps):
        train_step(task, engine, task.config, plan, train, step)


def _here(task: TimedTask, run_dir: Path) -> None:
    run_here(task, task.config, run_dir, lambda _record: None)


def _on_ray(task: TimedTask, run_dir: Path) -> None:
    from offsite_ray.train import run_on_ray

    run_on_ray(task, task.config, run_dir, lambda _record: None)


def _bare(task: TimedTask, _run_dir: Path) -> None:
    """Run a plain loop of torch over the task's module, with the same optimizer and clipping."""
    config = task.config
    device = torch.device("cuda" if config.use_gpu else "cpu")
    module = task.build(device)
    optimizer = adamw(module, config)
    trained = [p for p in module.parameters() if p.requires_grad]
    train, _ = task.datasets()
    plan = schedule(config, len(train))
    for step in range(plan.total_steps):
        rows = [train[row] for row in plan.rows(step)]
        counts = {"token": num_targets(rows), "sequence": len(rows)}
        mixed = config.dtype == "bf16"
        with torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext():
            parts = module(**collate(rows, device))
        loss = _weighted(task, parts, counts)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def _weighted(task: TimedTask, parts: Mapping[str, Tensor], counts: Mapping[str, int]) -> Tensor:
    terms: Sequence[Tensor] = [
        weight * parts[name] / counts[task.loss_units[name]]
        for name, weight in task.loss_weights.items()
    ]
    return torch.stack(list(terms)).sum()


WAYS: dict[str, Callable[[TimedTask, Path], None]] = {
    "shared": _steps_of_the_library,
    "plain": _bare,
    "bare": _bare,
    "here": _here,
    "ray": _on_ray,
}
"""What runs a task: name to ``(task, run directory)``."""


def measure(job: Job) -> list[Measured]:
    """Train for some steps; return what each worker measured."""
    with tempfile.TemporaryDirectory(dir=job.directory) as scratch:
        clocks, run_dir = Path(scratch) / "clocks", Path(scratch) / "run"
        clocks.mkdir()
        run_dir.mkdir()
        WAYS[job.way](task_of(job, clocks), run_dir)
        return [read_clock(path, job.warmup) for path in sorted(clocks.iterdir())]


if __name__ == "__main__":
    print(json.dumps(to_plain(measure(Job(**json.loads(sys.argv[1]))))))
