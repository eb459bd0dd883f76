# SPDX-License-Identifier: Apache-2.0
"""The run that fault drills break, and what it is compared by."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from offsite_ray.config import DistillConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
    given: dict[str, Any] = {
        "model": str(loop.model),
        "bundle": str(loop.bundle),
        "data": (str(loop.text),),
        "out": str(out),
        "num_workers": 0,
        **GIVEN,
        **changes,
    }
    return DistillConfig(**given)


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


def curve(result: DistillResult) -> list[dict[str, float]]:
    return [dict(record.losses) for record in result.history.steps]


def wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not there():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
