# SPDX-License-Identifier: Apache-2.0
"""A sweep of a tiny model, run in this process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from offsite_ray.config import SweepConfig
from offsite_ray.tune import SweepResult, sweep
from offsite_ray.tune.attempts import Silent
from offsite_ray.tune.plan import Job

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from offsite_ray.tune.folders import Record
    from tests.loops import Loop

SPACE: dict[str, Any] = {
    "any_of": [
        {"compress": {"plan": "1-2-1"}},
        {
            "compress": {"plan": "adapter=0,2,5 emulator=4"},
            "distill": {"max_steps": 2, "batch_size": 2},
        },
    ],
    "finetune": {"max_steps": 2, "batch_size": 2, "learning_rate": 3e-3},
}


class Seen(Silent):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.losses: list[tuple[str, int]] = []
        self.records: list[Record] = []

    def started(self, job: Job) -> None:
        self.begun.append(job.id)

    def evaluated(self, job: Job, step: int, losses: Mapping[str, float]) -> None:
        self.losses.append((job.id, step))

    def ended(self, record: Record) -> None:
        self.records.append(record)


def a_config(loop: Loop, out: Path, **changes: Any) -> SweepConfig:
    values: dict[str, Any] = {
        "model": str(loop.model),
        "private": (str(loop.text),),
        "public": (str(loop.rows),),
        "text": (str(loop.text),),
        "out": str(out),
        "seq_len": 16,
        "space": SPACE,
        "max_concurrent": 0,
    }
    return SweepConfig(**{**values, **changes})


def run(config: SweepConfig) -> tuple[SweepResult, Seen]:
    seen = Seen()
    return sweep(config, lambda _: None, lambda _: seen), seen


def table(result: SweepResult) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(result.table).to_pylist()
    return rows


def emulator_of(row: dict[str, Any]) -> str:
    """Return the name of the emulator of a row."""
    settings = json.loads(row["settings"])
    job = Job.from_plain({"role": row["role"], "settings": settings, "seed": row["seed"]})
    return job.emulator or ""
