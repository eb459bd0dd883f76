# SPDX-License-Identifier: Apache-2.0
"""A tiny model with its bundle and texts, for tests that train."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offsite_ray.config import CompressConfig, DistillConfig
from offsite_ray.emulator import compress
from offsite_ray.results import Record, RunStart, StepRecord
from tests.tiny_models import save_tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path


@dataclass(frozen=True)
class Loop:
    """Where everything is."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def bundle(self) -> Path:
        return self.root / "bundle"

    @property
    def keep_all(self) -> Path:
        return self.root / "keep-all"

    @property
    def text(self) -> Path:
        return self.root / "text.txt"

    @property
    def rows(self) -> Path:
        return self.root / "rows.jsonl"


def make_loop(root: Path, family: str = "gpt2", plan: str = "1-2-1") -> Loop:
    """Write a tiny model of six blocks, two bundles of it, and two texts."""
    loop = Loop(root)
    save_tiny(family, loop.model)
    for out, text in ((loop.bundle, plan), (loop.keep_all, "1-4-1")):
        compress(CompressConfig(model=str(loop.model), plan=text, out=str(out)))
    sentences = [f"The cat {i} sat on the mat {i * 7 % 13}. " for i in range(120)]
    loop.text.write_text("".join(sentences))
    loop.rows.write_text("".join(json.dumps({"text": s * 2}) + "\n" for s in sentences))
    return loop


def distill_config(loop: Loop, out: str | Path, **given: Any) -> DistillConfig:
    """Return the configuration of a distillation in this process, unless workers are given."""
    fields: dict[str, Any] = {
        "model": str(loop.model),
        "bundle": str(loop.bundle),
        "data": (str(loop.text),),
        "out": str(out),
        "num_workers": 0,
        "batch_size": 4,
        "seq_len": 32,
        **given,
    }
    return DistillConfig(**fields)


def ignore(_: Record) -> None:
    """Report to nobody."""


def start_of(seen: Iterable[Record]) -> RunStart:
    """Return the first start among what a run has reported."""
    return next(record for record in seen if isinstance(record, RunStart))


class Stopped(Exception):
    """A run was stopped on purpose."""


def stop_after(step: int) -> Callable[[Record], None]:
    """Return a report that stops the run when a step is done."""

    def report(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == step:
            raise Stopped

    return report
