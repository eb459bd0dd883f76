# SPDX-License-Identifier: Apache-2.0
"""What runs on each worker of Ray Train, and the files by which the driver learns of it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import StorageError
from offsite_ray.results import EvalRecord, StepRecord, TrainingHistory, to_plain
from offsite_ray.train.engine import DeepSpeedEngine
from offsite_ray.training import TrainingOutcome, training_loop
from offsite_ray.training.fragments import PARAMETER, FragmentReader, write_fragments
from offsite_ray.training.metrics import metrics_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offsite_ray.results import Record

RECORDS = "records.jsonl"
"""What worker 0 reports, a line each: ``[type, values]``."""

RESERVED = "reserved"
"""File that names the placement group of the workers that started last."""

RESULT = "result"
"""Directory of what was trained: fragments of every worker, history and shapes."""


def worker(given: dict[str, Any]) -> None:
    """Train on one worker of Ray Train; the process group is there already."""
    import ray
    import torch
    import torch._dynamo  # deepspeed.zero.Init breaks its first import

    task, config = given["task"], given["config"]
    run_dir = Path(given["run_dir"])
    # DeepSpeed compiles with ninja, which lies beside the interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if not config.use_gpu and not torch.cuda.is_available():
        torch.set_num_threads(given["num_threads"] or own_threads())
    engine = DeepSpeedEngine(task, config)
    reserved = ray.util.get_current_placement_group()
    if engine.rank == 0 and reserved is not None:
        (run_dir / RESERVED).write_text(reserved.id.hex(), encoding="utf-8")
    records = (run_dir / RECORDS).open("a", encoding="utf-8") if engine.rank == 0 else None
    steps: list[StepRecord] = []

    def report(record: Record) -> None:
        if isinstance(record, StepRecord):
            steps.append(record)
        if isinstance(record, EvalRecord):
            _tell_ray(metrics_for_ray(record, steps) if engine.rank == 0 else {})
            steps.clear()
        if records is not None:
            records.write(json.dumps([type(record).__name__, to_plain(record)]) + "\n")
            records.flush()

    try:
        if records is not None:
            records.write("\n")  # behind half a line, which a killed worker may have left
        history = training_loop(task, engine, config, run_dir, report)
        write_result(run_dir / RESULT, engine, history)
    finally:
        if records is not None:
            # On a full disk it fails once more, and would hide what failed first.
            with contextlib.suppress(OSError):
                records.close()


def own_threads() -> int:
    """Return how many of this node's cores are for each of the workers on it."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def metrics_for_ray(record: EvalRecord, steps: Sequence[StepRecord]) -> dict[str, Any]:
    """Return the numbers of an evaluation and the step before it, and all steps since the last."""
    return {
        "step": record.step,
        **(metrics_of(steps[-1]) if steps else {}),
        **metrics_of(record),
        "steps": [to_plain(step) for step in steps],
    }


def _tell_ray(metrics: dict[str, Any]) -> None:
    """Report to Ray Train, as all workers must, though it keeps what worker 0 says alone.

    Each step on its own would stop them: Ray Train holds one report of a worker until its
    controller asks again.
    """
    import ray.train

    ray.train.report(metrics)


def write_result(directory: Path, engine: DeepSpeedEngine, history: TrainingHistory) -> None:
    """Write what was trained; where one worker cannot, all of them raise :class:`StorageError`."""
    problem: OSError | None = None
    try:
        _write_part(directory, engine, history)
    except OSError as error:
        problem = error
    failed = engine.reduce([float(problem is not None)])  # a barrier: every part is written
    if any(failed):
        reason = problem.strerror if problem else "another worker could not write its part"
        raise StorageError(f"{directory}: {reason}; make room, and go on with --resume")


def _write_part(directory: Path, engine: DeepSpeedEngine, history: TrainingHistory) -> None:
    directory.mkdir(exist_ok=True)
    path = directory / f"worker-{engine.rank:05}.safetensors"
    path.unlink(missing_ok=True)
    write_fragments(path, engine.fragments((PARAMETER,)))
    if engine.rank == 0:
        plain = {
            "history": to_plain(history),
            "shapes": engine.shapes,
            "num_workers": engine.world_size,
        }
        (directory / "result.json").write_text(json.dumps(plain), encoding="utf-8")


def read_result(run_dir: Path) -> TrainingOutcome:
    """Return what the workers wrote when they were done."""
    directory = run_dir / RESULT
    plain = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    names = [f"worker-{rank:05}.safetensors" for rank in range(plain["num_workers"])]
    reader = FragmentReader([directory / name for name in names])
    return TrainingOutcome(
        history=TrainingHistory.from_plain(plain["history"]),
        state={name: reader.whole(name, shape) for name, shape in plain["shapes"].items()},
    )
