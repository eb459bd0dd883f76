# SPDX-License-Identifier: Apache-2.0
"""What was measured of serving, as the tables of docs/serving.md."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.page import table

if TYPE_CHECKING:
    from collections.abc import Mapping

BEGIN = "<!-- begin: written by benchmarks/serve.py -->"
_MIB = 2**20


def tables(result: Mapping[str, Any]) -> str:
    """Return the tables of what there is."""
    parts = [_conditions(result)]
    for part, show in (("engine", _engine), ("http", _http), ("faults", _faults)):
        if result[part] is not None:
            parts += show(result[part])
    return "\n".join(parts)


def _conditions(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    measured = "; ".join(
        f"{part} {one['date']}, commit {one['commit'] or 'unknown'}"
        for part, one in result["measured"].items()
    )
    return (
        f"{machine['cpu']}, {machine['num_cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.1f} GiB; {versions}; {measured}. GPT-2's "
        f"architecture, {result['blocks']} blocks of width {result['width']}, float32; adapter "
        "blocks 2 at the bottom and 2 at the top.\n"
    )


def _engine(ways: list[Mapping[str, Any]]) -> list[str]:
    found = {way["way"]: way for way in ways}

    def speed(name: str) -> float:
        seconds: list[float] = found[name]["seconds"]
        return int(found[name]["tokens"]) / statistics.median(seconds)

    rows = [
        (
            name,
            f"{speed(name):.1f}",
            f"{max(way['seconds']) / min(way['seconds']):.2f}",
            f"{way['loaded_bytes'] / _MIB:.0f}",
        )
        for name, way in found.items()
    ]
    shared, alone = found["16 tenants, full, together"], found["full model alone"]
    allowed = alone["loaded_bytes"] + 16 * shared["own_bytes"]
    copies = found["16 plugged-in copies"]["loaded_bytes"]

    def ratio(one: str, other: str) -> str:
        return f"{speed(one) / speed(other):.2f}"

    bars = [
        ("memory of 16 tenants over full model + 16 adapters", "at most 1.15",
         f"{shared['loaded_bytes'] / allowed:.2f}"),
        ("memory of 16 tenants over 16 copies", "", f"{shared['loaded_bytes'] / copies:.2f}"),
        ("16 tenants together over tenant by tenant, full", "at least 3.5",
         ratio("16 tenants, full, together", "16 tenants, full, one by one")),
        ("16 tenants together over tenant by tenant, LoRA", "at least 5",
         ratio("16 tenants, lora, together", "16 tenants, lora, one by one")),
        ("16 tenants over one tenant, LoRA", "at least 0.9",
         ratio("16 tenants, lora, together", "1 tenant, lora")),
        ("one tenant over `generate` one at a time", "at least 4",
         ratio("1 tenant, full", "generate, one at a time")),
        ("one tenant over transformers' continuous batching", "at least 1",
         ratio("1 tenant, full", "transformers' continuous batching")),
    ]  # fmt: skip
    head = ("16 requests, 64 + 64 tokens", "tokens/s", "slowest over fastest round", "MiB resident")
    return [table(head, rows), table(("ratio", "bar", "measured"), bars)]


def _http(found: Mapping[str, Any]) -> list[str]:
    head = (
        "over HTTP, streamed", "answers", "429", "errors", "tokens/s", "first token p50",
        "p99", "p99 / p50", "between tokens p50", "429 p50", "429 p99",
    )  # fmt: skip
    flood = found.get("overload", {}).get("offered_per_s")
    names = {
        "steady": "16 in flight, 16 tenants",
        "overload": "160 in flight"
        if flood is None
        else f"ten times as many: {flood:.0f} a second",
        "crowd": "160 clients, who come again after a second",
        "after": "16 in flight, right after",
    }
    rows = [_load_row(title, found[name]) for name, title in names.items() if name in found]
    steady = found["steady"]
    grown = ", ".join(f"{name} {share:+.1%}" for name, share in sorted(steady["growth"].items()))
    said = f"Memory over {steady['seconds'] / 60:.1f} minutes of steady load: {grown}.\n"
    if found["hey"] is not None:
        hey = found["hey"]
        said += (
            f"\n`hey`, 200 whole requests of 8 tokens, 16 at a time: {hey['statuses']}, "
            f"{hey['requests_per_s']:.1f} a second.\n"
        )
    return [table(head, rows), said]


def _load_row(title: str, load: Mapping[str, Any]) -> tuple[str, ...]:
    first, between = load["time_to_first_token"], load["between_tokens"]
    return (
        title,
        str(load["answers"]),
        str(load["refused"]),
        str(load["errors"]),
        f"{load['tokens_per_s']:.1f}",
        _seconds(first, "p50"),
        _seconds(first, "p99"),
        "" if first is None else f"{first['p99'] / first['p50']:.2f}",
        _seconds(between, "p50"),
        _seconds(load["refusal"], "p50"),
        _seconds(load["refusal"], "p99"),
    )


def _seconds(found: Mapping[str, float] | None, name: str) -> str:
    return "" if found is None else f"{found[name] * 1000:.0f} ms"


def _faults(found: Mapping[str, Any]) -> list[str]:
    return [
        f"Two replicas, 16 streams in flight, one replica killed: {found['answers']} answers, "
        f"{found['errors']} streams cut off with an error, {found['refused']} refused; a new "
        f"replica served all models after {found['whole_again_s']:.1f} s (the bar is 20).\n"
    ]
