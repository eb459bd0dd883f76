# SPDX-License-Identifier: Apache-2.0
"""Early stopping by asynchronous successive halving (ASHA; Li et al., arXiv 1810.05934).

On arrival at a rung, a number of steps, a distillation goes on if its loss is among the best of
those that have come there so far: one in ``reduction_factor``. Only equals are compared: emulators
of as many blocks, with as many steps ahead of them. What a rung knows lies in the sweep's
directory, so a sweep that was killed goes on comparing with all that ran before.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offsite_ray.bundle import write_json
from offsite_ray.distillation import DISTILLATION_LOSSES
from offsite_ray.errors import ConfigError, unknown_name
from offsite_ray.tune.folders import stopped_in

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offsite_ray.tune.plan import Job, Planner

PROXIES = ("loss", *DISTILLATION_LOSSES)
"""What distillations can be compared by: the weighted sum, or a part of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Halving:
    """When distillations are compared, and by what."""

    folder: str
    """Where the rungs lie."""
    grace_steps: int
    """Steps of the first rung."""
    reduction_factor: int
    proxy: str
    """Part of the held-out loss, lower is better."""
    planner: Planner

    def rung(self, step: int) -> int | None:
        """Return the highest rung that a step is at or beyond; None before the first."""
        if step < self.grace_steps:
            return None
        power = int(math.log(step / self.grace_steps, self.reduction_factor) + 1e-9)
        return int(self.grace_steps * self.reduction_factor**power)

    def stops(self, job: Job, step: int, losses: Mapping[str, float]) -> bool:
        """Keep a job's loss on its arrival at a rung; return whether the job is to be stopped.

        A job is judged when it arrives, never between rungs: by then others may have come to the
        rung, but its own loss there is of the past. Controls are kept, and never stopped. What is
        decided of a job is so of its emulator, whatever job distils it next, and is written down
        before the job can end.
        """
        rung, loss = self.rung(step), losses.get(self.proxy)
        if rung is None or loss is None or not math.isfinite(loss):
            return False
        path = self._equals(job) / str(rung) / f"{job.emulator}.json"
        if path.exists():
            return False
        write_json(path, loss)
        there = [
            json.loads(file.read_text(encoding="utf-8")) for file in path.parent.glob("*.json")
        ]
        stops = job.control is None and behind(loss, there, self.reduction_factor)
        if stops:
            write_json(stopped_in(Path(self.folder)) / f"{job.emulator}.json", step)
        return stops

    def _equals(self, job: Job) -> Path:
        """Return the folder of the jobs that a job is compared with.

        A larger emulator has the smaller loss, and a cosine of fewer steps is further down it at
        the same step; neither says which point is the better one of its kind.
        """
        size = len(self.planner.resolved(job.settings["compress"]).emulator)
        distill = job.settings["distill"]
        steps, epochs = distill.get("max_steps"), distill.get("epochs", 1)
        length = f"{epochs}-epochs" if steps is None else f"{steps}-steps"
        return Path(self.folder) / self.proxy / f"{size}-blocks-{length}"


def check_proxy(proxy: str) -> None:
    """Refuse a loss that there is none of; raise :class:`ConfigError`."""
    if proxy not in PROXIES:
        raise ConfigError(unknown_name("proxy", proxy, PROXIES))


def behind(loss: float, losses: Sequence[float], reduction_factor: int) -> bool:
    """Return whether a loss is not among the best ``1 / reduction_factor`` of all at a rung.

    Nothing is behind until there are as many as the factor: one of them can then be best.
    """
    if len(losses) < reduction_factor:
        return False
    promoted = sorted(losses)[: len(losses) // reduction_factor]
    return loss > promoted[-1]
