# SPDX-License-Identifier: Apache-2.0
"""What runs on each worker of Ray Train, and the files by which the driver learns of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import DivergedError, ResumeError, StorageError
from offsite_ray.results import EvalRecord, StepRecord, TrainingHistory, to_plain
from offsite_ray.train.engine import DeepSpeedEngine
from offsite_ray.training import TrainingOutcome, training_loop
from offsite_ray.training.fragments import PARAMETER, FragmentReader, write_fragments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offsite_ray.results import Record

RECORDS = "records.jsonl"
"""What worker 0 reports, a line each: ``[type, values]``."""

RESULT = "result"
"""Directory of what was trained: fragments of every worker, history and shapes."""

_FINAL = {cls.__name__: cls for cls in (DivergedError, ResumeError, StorageError)}
"""What every worker meets at once and would meet again: no reason to start the workers anew."""


def worker(given: dict[str, Any]) -> list[str] | None:
    """Train on one worker of Ray Train; the process group is there already.

    Returns:
        Name and text of an error that starting again would not mend, or None.
    """
    import torch
    import torch._dynamo  # deepspeed.zero.Init breaks its first import

    task, config = given["task"], given["config"]
    run_dir = Path(given["run_dir"])
    if not config.use_gpu and not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    engine = DeepSpeedEngine(task, config)
    records = (run_dir / RECORDS).open("a", encoding="utf-8") if engine.rank == 0 else None
    steps: list[StepRecord] = []

    def report(record: Record) -> None:
        if isinstance(record, StepRecord):
            steps.append(record)
        if isinstance(record, EvalRecord):
            _tell_ray(record, steps)
            steps.clear()
        if records is not None:
            records.write(json.dumps([type(record).__name__, to_plain(record)]) + "\n")
            records.flush()

    try:
        history = training_loop(task, engine, config, run_dir, report)
        _write_result(run_dir / RESULT, engine, history)
    except tuple(_FINAL.values()) as error:
        return [type(error).__name__, str(error)]
    finally:
        if records is not None:
            records.close()
    return None


def raise_final(told: list[str] | None) -> None:
    """Raise what :func:`worker` returned, if it is an error."""
    if told is not None:
        raise _FINAL[told[0]](told[1])


def _tell_ray(record: EvalRecord, steps: Sequence[StepRecord]) -> None:
    """Report an evaluation to Ray Train, with the steps since the last, as all workers must.

    Each step on its own would stop them: Ray Train holds one report of a worker until its
    controller asks again, every other second.
    """
    import ray.train

    ray.train.report(
        {
            "step": record.step,
            **record.losses,
            **record.diagnostics,
            "steps": [to_plain(step) for step in steps],
        }
    )


def _write_result(directory: Path, engine: DeepSpeedEngine, history: TrainingHistory) -> None:
    directory.mkdir(exist_ok=True)
    path = directory / f"worker-{engine.rank:05}.safetensors"
    path.unlink(missing_ok=True)
    write_fragments(path, [f for f in engine.fragments() if f.kind == PARAMETER])
    if engine.rank == 0:
        plain = {
            "history": to_plain(history),
            "shapes": engine.shapes,
            "num_workers": engine.world_size,
        }
        (directory / "result.json").write_text(json.dumps(plain), encoding="utf-8")
    engine.reduce([0.0])  # a barrier: every part is written


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
