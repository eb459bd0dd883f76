# SPDX-License-Identifier: Apache-2.0
"""Early stopping by asynchronous successive halving (ASHA; Li et al., arXiv 1810.05934).

At a rung, a number of steps, a distillation goes on if its loss is among the best of those that
have come there so far: one in ``reduction_factor``. What a rung knows lies in the sweep's
directory, so a sweep that was killed goes on comparing with all that ran before.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offsite_ray.tune.folders import write_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


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

    def rung(self, step: int) -> int | None:
        """Return the highest rung that a step is at or beyond; None before the first."""
        if step < self.grace_steps:
            return None
        power = int(math.log(step / self.grace_steps, self.reduction_factor) + 1e-9)
        return int(self.grace_steps * self.reduction_factor**power)

    def keep(self, job: str, step: int, losses: Mapping[str, float]) -> None:
        """Keep a job's loss at the rung that its step has come to; the first there counts."""
        rung, loss = self.rung(step), losses.get(self.proxy)
        if rung is None or loss is None or not math.isfinite(loss):
            return
        path = Path(self.folder) / str(rung) / f"{job}.json"
        if not path.exists():
            write_json(path, loss)

    def is_hopeless(self, job: str, step: int) -> bool:
        """Return whether a job is behind at the rung that its step has come to."""
        rung = self.rung(step)
        if rung is None:
            return False
        losses = {
            path.stem: float(json.loads(path.read_text(encoding="utf-8")))
            for path in (Path(self.folder) / str(rung)).glob("*.json")
        }
        return job in losses and behind(losses[job], list(losses.values()), self.reduction_factor)


def behind(loss: float, losses: Sequence[float], reduction_factor: int) -> bool:
    """Return whether a loss is not among the best ``1 / reduction_factor`` of all at a rung.

    Nothing is behind until there are as many as the factor: one of them can then be best.
    """
    if len(losses) < reduction_factor:
        return False
    promoted = sorted(losses)[: len(losses) // reduction_factor]
    return loss > promoted[-1]
