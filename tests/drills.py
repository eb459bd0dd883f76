# SPDX-License-Identifier: Apache-2.0
"""The run that fault drills break, and what it is compared by."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tests.loops import distill_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offsite_ray.config import DistillConfig
    from offsite_ray.distillation import DistillResult
    from tests.loops import Loop

STEPS = 60
GIVEN = {
    "max_steps": STEPS,
    "batch_size": 4,
    "seq_len": 32,
    "learning_rate": 3e-3,
    "checkpoint_every": 5,
    "eval_every": 20,
}
SHARDED = {"num_workers": 2, "zero_stage": 3}


def config(loop: Loop, out: Path, **changes: Any) -> DistillConfig:
    return distill_config(loop, out, **{**GIVEN, **changes})


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


def curve(result: DistillResult) -> list[dict[str, float]]:
    return [dict(record.losses) for record in result.history.steps]


def wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not there():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
