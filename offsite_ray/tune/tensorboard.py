# SPDX-License-Identifier: Apache-2.0
"""The numbers of a sweep in TensorBoard: a run for each job."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from offsite_ray.results import SETTINGS
from offsite_ray.training.metrics import event_writer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from offsite_ray.tune.attempts import Watch
    from offsite_ray.tune.folders import Record
    from offsite_ray.tune.plan import Job


class TensorBoardToo:
    """Passes on what happens in a sweep, and writes its numbers."""

    def __init__(self, directory: Path, other: Watch) -> None:
        """Write below a directory, and tell another watch."""
        self._directory, self._other = directory, other

    def started(self, job: Job) -> None:
        """Pass it on."""
        self._other.started(job)

    def evaluated(self, job: Job, step: int, losses: Mapping[str, float]) -> None:
        """Write the held-out losses of a distillation."""
        self._write(job.id, {f"distill/{name}": loss for name, loss in losses.items()}, step)
        self._other.evaluated(job, step, losses)

    def ended(self, record: Record) -> None:
        """Write what was measured, at the step to which the emulator was distilled."""
        settings = record["job"]["settings"]
        step = int(settings.get("distill", {}).get("max_steps") or 0)
        values = {}
        for setting in SETTINGS:
            measured = (record.get("measured") or {}).get(setting) or {}
            values[f"nats_per_token/{setting}"] = measured.get("nats_per_token")
            for task, metrics in (measured.get("tasks") or {}).items():
                values |= {f"{task}/{setting}/{name}": value for name, value in metrics.items()}
        seconds = record.get("seconds", {})
        values |= {f"seconds/{stage}": value for stage, value in seconds.items()}
        words = json.dumps(settings, indent=1)
        self._write(record["id"], values, step, words)
        self._other.ended(record)

    def _write(self, job: str, values: Mapping[str, Any], step: int, words: str = "") -> None:
        known = {n: v for n, v in values.items() if v is not None and math.isfinite(v)}
        if not known:
            return
        # Opened for each: a sweep of thousands of jobs keeps no files open.
        with event_writer(self._directory / job) as writer:
            for name, value in known.items():
                writer.add_scalar(name, value, step)
            if words:
                writer.add_text("settings", f"    {words}", step)
