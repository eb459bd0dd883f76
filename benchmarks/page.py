# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown, and the part of docs/benchmarks.md that shows them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

BEGIN = "<!-- begin: written by benchmarks/finetune.py -->"
END = "<!-- end -->"

_DEVICES = {"cpu": "Without a GPU", "cuda": "With a GPU"}
_MIB = 2**20


def update(page: Path, results: Path) -> None:
    """Put what a directory of results holds between the marks of a page."""
    put(page, BEGIN, section(results))


def put(page: Path, begin: str, shown: str) -> None:
    """Put something between a mark of a page and the end mark that follows."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{begin}\n\n{shown}\n{END}{after}", encoding="utf-8")


def section(results: Path) -> str:
    """Return the tables of all devices; where there is no result, say so."""
    parts = []
    for device, title in _DEVICES.items():
        file = results / f"finetune-{device}.json"
        known = tables(json.loads(file.read_text("utf-8"))) if file.exists() else "Not measured.\n"
        parts.append(f"### {title}\n\n{known}")
    return "\n".join(parts)


def tables(result: Mapping[str, Any]) -> str:
    """Return what was measured on one device: on what, then two tables for each model."""
    parts = [_conditions(result)]
    for comparison in result["comparisons"]:
        parts += [_title(comparison), _speed(comparison), _memory(comparison)]
    return "\n".join(parts)


def _conditions(result: Mapping[str, Any]) -> str:
    machine, effort = result["machine"], result["effort"]
    first = result["comparisons"][0]["rows"][0]["rounds"][0]
    flags = ", ".join(machine["cpu_flags"])
    where = (
        f"{machine['cpu']} ({flags}), {machine['num_cores']} cores, {first['num_threads']} threads"
    )
    if machine["gpu"]:
        where = f"{machine['gpu']}; {where}"
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (
        f"{where}, {machine['memory_bytes'] / 2**30:.1f} GiB, {machine['system']}; {versions}; "
        f"{result['date']}, commit {result['commit'] or 'unknown'}. Sequences of "
        f"{effort['seq_len']} tokens, batch {effort['batch_size']}, LoRA of rank "
        f"{result['lora_rank']}; medians of {effort['rounds']} processes with {effort['steps']} "
        f"steps each, after {effort['warmup']}.\n"
    )


def _title(comparison: Mapping[str, Any]) -> str:
    shape, dtype = comparison["shape"], comparison["dtype"]
    return f"**{shape['title']}, {dtype}**: stored in {dtype}, arithmetic in {dtype}.\n"


def _speed(comparison: Mapping[str, Any]) -> str:
    head = (
        "throughput", "trains", "tokens/s", "x full", "floor", "of the floor",
        "forward", "backward", "optimizer",
    )  # fmt: skip
    rows = [
        (
            row["title"],
            f"{row['num_trained'] / 1e6:.1f} M of {row['num_parameters'] / 1e6:.1f} M",
            f"{row['tokens_per_s']:.1f}",
            f"{ratios['throughput']:.2f}",
            f"{ratios['throughput_floor']:.2f}",
            f"{ratios['throughput'] / ratios['throughput_floor']:.0%}",
            *(_seconds(row["phase_seconds"][p]) for p in ("forward", "backward", "optimizer")),
        )
        for row, ratios in zip(comparison["rows"], comparison["ratios"], strict=True)
    ]
    return table(head, rows)


def _memory(comparison: Mapping[str, Any]) -> str:
    head = ("memory", "peak", "full over this", "floor", "of the floor", "bytes of the floor")
    rows = [
        (
            row["title"],
            _mib(row["memory_bytes"]),
            f"{ratios['memory']:.2f}",
            f"{ratios['memory_floor']:.2f}",
            f"{ratios['memory'] / ratios['memory_floor']:.0%}",
            _mib(row["bytes_total"]),
        )
        for row, ratios in zip(comparison["rows"], comparison["ratios"], strict=True)
    ]
    return table(head, rows)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def _mib(value: int) -> str:
    return f"{value / _MIB:,.0f} MiB"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are numbers."""
    marks = ["---", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, marks, *rows))
