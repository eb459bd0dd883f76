# SPDX-License-Identifier: Apache-2.0
"""Results of the distillation benchmark as Markdown."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from benchmarks.page import table

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

BEGIN = "<!-- begin: written by benchmarks/distill.py -->"

_MIB = 2**20


_DEVICES = {"cpu": "Without a GPU", "cuda": "With a GPU"}


def section(results: Path) -> str:
    """Return the tables of all devices; where there is no result, say so."""
    parts = []
    for device, title in _DEVICES.items():
        file = results / f"distill-{device}.json"
        known = tables(json.loads(file.read_text("utf-8"))) if file.exists() else "Not measured.\n"
        parts.append(f"### {title}\n\n{known}")
    return "\n".join(parts)


def tables(result: Mapping[str, Any]) -> str:
    """Return what was measured: for each part on what, then a table for each model."""
    parts = []
    for part, (title, show) in _PARTS.items():
        if part in result:
            parts.append(f"**{title}**. {_conditions(result[part])}")
            for model in result[part]["models"]:
                plan = f"{model['shape']['title']}, plan {model['shape']['plan']}"
                parts += [
                    f"{plan}, {result[part]['dtype']}:\n",
                    show(model, result[part]["effort"]),
                ]
    return "\n".join(parts)


def _conditions(part: Mapping[str, Any]) -> str:
    machine, threads = part["machine"], _num_threads(part["models"][0]["rows"][0])
    where = f"{machine['gpu'] or machine['cpu']}, {machine['num_cores']} cores, {threads} threads"
    versions = ", ".join(f"{name} {number}" for name, number in part["versions"].items())
    return (
        f"{where}, {machine['memory_bytes'] / 2**30:.1f} GiB; {versions}; {part['date']}, commit "
        f"{part['commit'] or 'unknown'}.\n"
    )


def _num_threads(row: Mapping[str, Any]) -> int:
    threads: int = row.get("shared", row)["rounds"][0][0]["num_threads"]
    return threads


def _ways(model: Mapping[str, Any], effort: Mapping[str, Any]) -> str:
    head = (
        "loss", "plain, tokens/s", "this loop, tokens/s", "ratio", "ratio of processor time",
        "floor", "plain, peak", "this loop, peak",
    )  # fmt: skip
    tokens = effort["seq_len"] * effort["batch_size"]
    rows = [
        (
            row["loss"],
            f"{tokens / row['plain']['seconds']:.1f}",
            f"{tokens / row['shared']['seconds']:.1f}",
            f"{row['throughput']:.2f}",
            f"{row['throughput_cpu']:.2f}",
            f"{row['floor']:.2f}",
            _mib(row["plain"]["memory_bytes"][0]),
            _mib(row["shared"]["memory_bytes"][0]),
        )
        for row in model["rows"]
    ]
    return table(head, rows)


def _stages(model: Mapping[str, Any], _effort: Mapping[str, Any]) -> str:
    head = ("stage", "workers", "peak of each rank")
    return table(
        head,
        (
            (row["title"], str(row["num_workers"]), ", ".join(map(_mib, row["memory_bytes"])))
            for row in model["rows"]
        ),
    )


def _loops(model: Mapping[str, Any], _effort: Mapping[str, Any]) -> str:
    head = (
        "loop",
        "step",
        "over bare",
        "processor time",
        "over bare",
        "of the training thread",
        "over bare",
    )
    kinds = ("seconds", "cpu_seconds", "thread_seconds")
    rows = [
        (
            row["title"],
            *(
                shown
                for kind in kinds
                for shown in (f"{row[kind] * 1000:.1f} ms", f"{row['over_bare'][kind]:+.1%}")
            ),
        )
        for row in model["rows"]
    ]
    return table(head, rows)


_PARTS = {
    "ways": ("Against the plain way", _ways),
    "stages": ("Memory of each rank", _stages),
    "loops": ("Overhead of Ray and DeepSpeed", _loops),
}


def _mib(value: int) -> str:
    return f"{value / _MIB:,.0f} MiB"
