# SPDX-License-Identifier: Apache-2.0
"""What is measured while models are served, as metrics of Ray, which gives them to Prometheus."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from ray.serve import metrics

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from offsite_ray.serving.asks import Ask
    from offsite_ray.serving.engine import Engine
    from offsite_ray.serving.requests import Piece

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]

_HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival at the replica to its first token",
    "inter_token_latency_seconds": "Between two tokens of a text",
    "request_seconds": "From a request's arrival at the replica to its end",
}
_COUNTERS = {
    "requests": ("Requests, by what became of them", ("model", "outcome")),
    "prompt_tokens": ("Tokens of prompts", ("model",)),
    "answer_tokens": ("Tokens of answers", ("model",)),
    "versions_loaded": ("Versions of adapters that a replica has read", ("model",)),
    "tenants_brought": ("Times that a tenant came into the model", ()),
    "tenants_evicted": ("Times that a tenant left the model for host memory", ()),
    "decoding_steps": ("Decoding steps", ()),
}
_GAUGES = {
    "requests_waiting": "Requests that are not yet let in",
    "texts_running": "Texts that are written",
    "batch_occupancy": "Texts of a decoding step over the most there may be, since the last look",
    "cache_tokens": "Tokens whose keys and values are held, padding included",
    "cache_use": "These over the most there may be",
    "tenant_bytes": "Bytes of tenants' tensors in the model",
}


def counter(name: str) -> metrics.Counter:
    """Return a counter, by its name in the table; each process has its own."""
    text, tags = _COUNTERS[name]
    return metrics.Counter(f"offsite_ray_{name}", text, tag_keys=tags)  # type: ignore[arg-type]


class Meters:
    """The metrics of a replica; all are called ``offsite_ray_...``."""

    def __init__(self) -> None:
        """Register them with Ray."""
        self._histograms = {
            name: metrics.Histogram(
                f"offsite_ray_{name}", text, boundaries=_SECONDS, tag_keys=("model",)
            )
            for name, text in _HISTOGRAMS.items()
        }
        self._counters = {name: counter(name) for name in _COUNTERS}
        self._gauges = {
            name: metrics.Gauge(f"offsite_ray_{name}", text) for name, text in _GAUGES.items()
        }
        self._last: dict[str, float] = {}

    def loaded(self, model: str) -> None:
        """Count a version that was read."""
        self._counters["versions_loaded"].inc(1, {"model": model})

    @contextlib.contextmanager
    def watch(self, ask: Ask) -> Iterator[Watch]:
        """Measure a request until it is answered, refused, or given up."""
        watch, outcome = Watch(ask, self._histograms), "cancelled"
        try:
            yield watch
            outcome = "answered"
        except Exception:
            outcome = "refused"
            raise
        finally:
            tags = {"model": ask.model}
            self._counters["requests"].inc(1, {**tags, "outcome": watch.failed or outcome})
            if watch.num_tokens:
                self._counters["prompt_tokens"].inc(len(ask.prompt), tags)
                self._counters["answer_tokens"].inc(watch.num_tokens, tags)
            self._histograms["request_seconds"].observe(time.monotonic() - watch.began, tags)

    def look(self, engine: Engine) -> None:
        """Take what the engine says of itself; called again and again."""
        counts, limits, residency = engine.counts, engine.limits, engine.residency
        steps = self._since("decoding_steps", counts.steps)
        rows = self._since("rows", counts.rows)
        for name, total in (
            ("tenants_brought", residency.num_brought),
            ("tenants_evicted", residency.num_evicted),
        ):
            if new := self._since(name, total):
                self._counters[name].inc(new)
        if steps:
            self._counters["decoding_steps"].inc(steps)
        for name, value in (
            ("requests_waiting", engine.num_waiting),
            ("texts_running", engine.num_running),
            ("batch_occupancy", rows / steps / limits.max_rows if steps else 0),
            ("cache_tokens", engine.cache_tokens),
            ("cache_use", engine.cache_tokens / limits.cache_tokens),
            ("tenant_bytes", residency.bytes_here),
        ):
            self._gauges[name].set(value)

    def _since(self, name: str, total: float) -> float:
        """Return by how much a total has grown since it was last looked at."""
        grown = total - self._last.get(name, 0)
        self._last[name] = total
        return grown


class Watch:
    """Measures a request."""

    def __init__(self, ask: Ask, histograms: dict[str, Any]) -> None:
        """Begin now."""
        self.began = time.monotonic()
        self.num_tokens = 0
        self.failed: str | None = None
        self._tags = {"model": ask.model}
        self._histograms = histograms
        self._last: dict[int, float] = {}

    def told(self, pieces: Sequence[Piece]) -> None:
        """Look at pieces that have come."""
        now = time.monotonic()
        for piece in pieces:
            if piece.finish in ("error", "busy"):
                self.failed = {"error": "failed", "busy": "refused"}[piece.finish]
            if not piece.tokens:
                continue
            if not self.num_tokens:
                first = self._histograms["time_to_first_token_seconds"]
                first.observe(now - self.began, self._tags)
            if piece.index in self._last:
                between = self._histograms["inter_token_latency_seconds"]
                between.observe(now - self._last[piece.index], self._tags)
            self._last[piece.index] = now
            self.num_tokens += len(piece.tokens)
