# SPDX-License-Identifier: Apache-2.0
"""What a verb does, as gauges of Ray, which gives them to Prometheus as ``ray_offsite_ray_...``.

Served models have meters of their own, in :mod:`offsite_ray.serving.meters`.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

from offsite_ray.repeating import repeating
from offsite_ray.results import DevicesRecord, EvalRecord, RunStart, StepRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from offsite_ray.data import PartsRecord
    from offsite_ray.results import Record

PREFIX = "offsite_ray_"
_AGAIN_S = 5.0
"""Ray passes on what was set since it last did, every ten seconds, and forgets the rest soon."""

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "run_seconds": ("Seconds since the run's process began", ()),
    "held_gpus": ("GPUs that workers of the run hold", ()),
    "held_cpus": ("CPUs that workers of the run hold", ()),
    "train_steps": ("Optimizer steps done", ()),
    "train_steps_planned": ("Optimizer steps of the whole run", ()),
    "train_loss": ("Loss of the last step, by its part; loss is their weighted sum", ("part",)),
    "train_held_out_loss": ("Loss on held-out data, by its part", ("part",)),
    "train_learning_rate": ("Learning rate of the last step", ()),
    "train_grad_norm": ("Norm of the gradient before clipping", ()),
    "train_tokens_per_second": ("Tokens a second, over all workers", ()),
    "train_flops_utilisation": ("Share of the devices' peak arithmetic, from 0 to 1", ()),
    "train_peak_memory_bytes": ("Most memory of worker 0 so far", ()),
    "sweep_jobs": ("Jobs of a sweep, by status", ("status",)),
    "sweep_jobs_planned": ("Jobs of the whole sweep", ()),
    "sweep_best_plug_in_nats": ("Nats per token of the best plug-in so far", ()),
    "prepare_parts": ("Parts of a text that are prepared", ()),
    "prepare_parts_planned": ("Parts of the whole text", ()),
    "prepare_tokens": ("Tokens that are prepared", ()),
    "prepare_tokens_per_second": ("Tokens a second, over all workers", ()),
}
"""Name behind ``offsite_ray_`` to what it says and its labels beside ``run`` and ``verb``."""

Value = tuple[str, float, dict[str, str]]
"""Name, value and labels of a gauge."""


class Gauges:
    """The gauges of a process; nothing where it is not connected to Ray, which it never imports."""

    def __init__(self, run: str, verb: str) -> None:
        """Register nothing yet.

        Args:
            run: Name of the run; empty where it has none.
            verb: What is run.
        """
        self._labels = {"run": run, "verb": verb}
        self._gauges: dict[str, Any] = {}
        self._last: dict[tuple[str, str], Value] = {}
        self._lock = threading.Lock()

    def set(self, values: Iterable[Value]) -> None:
        """Set gauges, to be kept so until they are set again."""
        with self._lock:
            self._set(values)

    def kept(self) -> AbstractContextManager[None]:
        """Keep Ray from forgetting what was set, until the block ends."""
        return repeating(self._set_again, _AGAIN_S, "gauges")

    def _set_again(self) -> None:
        with self._lock:  # or what is set meanwhile would be set back
            self._set(list(self._last.values()))

    def _set(self, values: Iterable[Value]) -> None:
        # While another thread imports it, it is there and has no names yet.
        is_connected = getattr(sys.modules.get("ray"), "is_initialized", None)
        if is_connected is None or not is_connected():
            return
        for name, value, labels in values:
            self._gauge(name).set(value, {**self._labels, **labels})
            self._last[name, str(labels)] = name, value, labels

    def _gauge(self, name: str) -> Any:
        if name not in self._gauges:
            from ray.util.metrics import Gauge

            text, labels = GAUGES[name]
            self._gauges[name] = Gauge(f"{PREFIX}{name}", text, tag_keys=(*self._labels, *labels))
        return self._gauges[name]


def of_run(seconds: float, num_gpus: float | None, num_cpus: float | None) -> Iterator[Value]:
    """Give the gauges of any run; of devices that nobody knows there are none."""
    yield from _known({"run_seconds": seconds, "held_gpus": num_gpus, "held_cpus": num_cpus})


def of_training(record: Record) -> Iterator[Value]:
    """Give the gauges of what a training reports."""
    if isinstance(record, RunStart):
        yield from _known(
            {"train_steps": record.first_step, "train_steps_planned": record.total_steps}
        )
    elif isinstance(record, StepRecord):
        yield from _known(
            {
                "train_steps": record.step,
                "train_learning_rate": record.learning_rate,
                "train_grad_norm": record.grad_norm,
                "train_tokens_per_second": record.tokens_per_s,
                "train_flops_utilisation": record.flops_utilisation,
                "train_peak_memory_bytes": record.peak_memory_bytes,
            }
        )
        yield from (("train_loss", loss, {"part": part}) for part, loss in record.losses.items())
    elif isinstance(record, EvalRecord):
        for part, loss in record.losses.items():
            yield "train_held_out_loss", loss, {"part": part}
    elif isinstance(record, DevicesRecord):
        yield from _known({"held_gpus": record.num_gpus, "held_cpus": record.num_cpus})


def of_sweep(
    statuses: Mapping[str, int], planned: int | None, best_nats: float | None
) -> Iterator[Value]:
    """Give the gauges of a sweep.

    Args:
        statuses: Of its jobs, to how many have it.
        planned: Jobs of the whole sweep, if they are known.
        best_nats: Nats per token of the best plug-in so far.
    """
    yield from (("sweep_jobs", num, {"status": status}) for status, num in statuses.items())
    yield from _known({"sweep_jobs_planned": planned, "sweep_best_plug_in_nats": best_nats})


def of_preparing(record: PartsRecord) -> Iterator[Value]:
    """Give the gauges of how far the preparing of a text is."""
    yield from _known(
        {
            "prepare_parts": record.num_done,
            "prepare_parts_planned": record.num_parts,
            "prepare_tokens": record.num_tokens,
            "prepare_tokens_per_second": record.tokens_per_s,
        }
    )


def _known(values: Mapping[str, float | None]) -> Iterator[Value]:
    return ((name, float(value), {}) for name, value in values.items() if value is not None)
