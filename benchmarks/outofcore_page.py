# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of large models measured, as Markdown, with the bars that it is held to."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.page import table

if TYPE_CHECKING:
    from collections.abc import Mapping

BEGIN = "<!-- begin: written by benchmarks/outofcore.py -->"

MEMORY_BAR = 2**30
"""Most bytes that a verb may hold beyond an interpreter with its imports."""
TIME_BAR = 1.5
"""Most times that a verb may take of what cp takes for the bytes that it writes."""


def tables(result: Mapping[str, Any]) -> str:
    """Return two tables for each model, and on what it was measured."""
    parts = []
    for model in result.values():
        shape, machine = model["shape"], model["machine"]
        flags = ", ".join(machine["cpu_flags"])
        versions = ", ".join(f"{name} {number}" for name, number in model["versions"].items())
        parts += [
            f"**{shape['title']}**, {model['model_bytes'] / 1e9:.1f} GB in bf16, plan "
            f"{shape['plan']}. {machine['cpu']} ({flags}), {machine['num_cores']} cores, "
            f"{machine['memory_bytes'] / 2**30:.1f} GiB, {machine['system']}; {versions}; "
            f"{model['date']}, commit {model['commit'] or 'unknown'}; "
            f"{model['num_rounds']} runs of each verb.\n",
            _memory(model),
            _time(model),
        ]
    return "\n".join(parts)


def grown_bytes(row: Mapping[str, Any]) -> int:
    """Return the peak of a verb beyond an interpreter with its imports, of its largest run."""
    most = max(run["verb"]["peak_bytes"] for run in row["rounds"])
    return int(most - row["imports"]["peak_bytes"])


def seconds(row: Mapping[str, Any]) -> dict[str, float]:
    """Return medians over the rounds.

    Returns:
        ``process``: of the whole process; ``start``: of the same on a model of kilobytes; ``work``:
        what is between them; ``cp``, and ``synced``: with the sync that follows.
    """
    rounds = row["rounds"]
    parts = {
        "process": [run["verb"]["seconds"] for run in rounds],
        "start": [run["kilobytes"]["seconds"] for run in rounds],
        "work": [run["verb"]["seconds"] - run["kilobytes"]["seconds"] for run in rounds],
        "cp": [run["copy_seconds"] for run in rounds],
        "synced": [
            None if run["copy_seconds"] is None else run["copy_seconds"] + run["sync_seconds"]
            for run in rounds
        ],
    }
    return {name: statistics.median(values) for name, values in parts.items() if None not in values}


def _memory(model: Mapping[str, Any]) -> str:
    head = ("memory", "files given", "imports", "peak", "beyond imports", "at most 1 GiB")
    rows = [
        (
            row["name"],
            f"{row['given_bytes'] / 1e9:.1f} GB",
            _mib(row["imports"]["peak_bytes"]),
            _mib(row["imports"]["peak_bytes"] + grown_bytes(row)),
            _mib(grown_bytes(row)),
            _verdict(grown_bytes(row) <= MEMORY_BAR),
        )
        for row in model["rows"]
    ]
    return table(head, rows)


def _time(model: Mapping[str, Any]) -> str:
    head = (
        "time", "reads from disk", "writes", "process", "starting", "its work", "cp", "cp and sync",
        "work / cp", "work / cp and sync", "process / cp and sync",
    )  # fmt: skip
    rows = []
    for row in model["rows"]:
        took = seconds(row)
        cells = [f"{took[name]:.1f} s" for name in ("process", "start", "work")]
        if "cp" in took:
            cells += [f"{took[name]:.1f} s" for name in ("cp", "synced")]
            cells += [
                _ratio(took[over] / took[under])
                for over, under in (("work", "cp"), ("work", "synced"), ("process", "synced"))
            ]
        else:
            cells += [""] * 5
        from_disk = [run["verb"].get("disk_bytes") for run in row["rounds"]]
        read = "not measured" if None in from_disk else f"{max(from_disk) / 1e9:.2f} GB"
        rows.append((row["name"], read, f"{row['written_bytes'] / 1e9:.2f} GB", *cells))
    return table(head, rows)


def _ratio(value: float) -> str:
    return f"{value:.2f} ({_verdict(value <= TIME_BAR)})"


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
