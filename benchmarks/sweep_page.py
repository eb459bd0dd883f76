# SPDX-License-Identifier: Apache-2.0
"""What a measurement of sweeps found, as Markdown."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

BEGIN = "<!-- begin: written by benchmarks/sweep.py -->"

MOST_OF_ONE_PROCESS = 0.6
"""Share of the time of one process that two trials at a time may take."""
MOST_TO_FIRST_TRIAL = 25.0
"""Seconds to the first trial."""

_MIB = 2**20


def tables(result: Mapping[str, Any]) -> str:
    """Return the tables of every way, and what they say of the bars."""
    lines = [_conditions(result), ""]
    for of, part in (("time", _times), ("memory", _memory)):
        if any(run["of"] == of for run in result["runs"]):
            lines += [*part(result), ""]
    return "\n".join(lines)


def _times(result: Mapping[str, Any]) -> list[str]:
    runs = _ways(result, "time")
    lines = ["| way | all trials | first trial after | a trial |", "| --- | --: | --: | --: |"]
    for (concurrent, threads), run in runs.items():
        lines.append(
            f"| {_name(concurrent, threads)} | {run['seconds']:.0f} s | "
            f"{run['first_trial_seconds']:.1f} s | {run['trial_seconds']:.1f} s |"
        )
    two = next(run for (concurrent, _), run in runs.items() if concurrent == 2)
    shares = {
        threads: two["seconds"] / run["seconds"]
        for (concurrent, threads), run in runs.items()
        if concurrent == 0
    }
    said = ", ".join(
        f"{share:.2f} of the time of one process with {threads} thread{'s' * (threads > 1)} "
        f"({_met(share <= MOST_OF_ONE_PROCESS)})"
        for threads, share in shares.items()
    )
    first = two["first_trial_seconds"]
    return [
        *lines,
        "",
        f"Two at a time take {said}; the bar is {MOST_OF_ONE_PROCESS}. The first trial starts "
        f"after {first:.1f} s, and may after {MOST_TO_FIRST_TRIAL:.0f} s "
        f"({_met(first <= MOST_TO_FIRST_TRIAL)}).",
    ]


def _memory(result: Mapping[str, Any]) -> list[str]:
    runs = {concurrent: run for (concurrent, _), run in _ways(result, "memory").items()}
    lines = ["| trials at a time | a process at its start | peak of all |", "| --: | --: | --: |"]
    for concurrent, run in runs.items():
        lines.append(
            f"| {concurrent} | {run['start_bytes'] / _MIB:.0f} MiB | "
            f"{run['peak_bytes'] / _MIB:.0f} MiB |"
        )
    emulator = runs[1]["bundle_bytes"]
    return [
        f"Memory, with a model of the same {result['plan']} of width {result['hidden']} whose "
        f"weights take {runs[1]['full_model_bytes'] / _MIB:.0f} MiB and an emulator's "
        f"{emulator / _MIB:.0f} MiB, fine-tuned by LoRA; a page that n processes share counts 1/n "
        "for each:",
        "",
        *lines,
        "",
        " ".join(
            _growth(runs[1], run, concurrent) for concurrent, run in runs.items() if concurrent > 1
        ),
    ]


def _growth(one: Mapping[str, float], run: Mapping[str, float], concurrent: int) -> str:
    """Return what a further trial takes, the mean of those beside the first."""
    grown = (run["peak_bytes"] - one["peak_bytes"]) / (concurrent - 1)
    beyond, emulator = grown - run["start_bytes"], run["bundle_bytes"]
    return (
        f"Of {concurrent} at a time, each but the first takes {grown / _MIB:.0f} MiB, which is "
        f"{beyond / _MIB:.0f} MiB beyond its process with Python and torch: "
        f"{beyond / emulator:.2f} copies of the emulator, and may take 1 "
        f"({_met(beyond <= emulator)})."
    )


def _name(concurrent: int, threads: int) -> str:
    if concurrent == 0:
        return f"one process, without Ray, {threads} thread{'s' * (threads > 1)}"
    return f"Ray Tune, {'one' if concurrent == 1 else 'two'} at a time, 1 thread each"


def _ways(result: Mapping[str, Any], of: str) -> dict[tuple[int, int], dict[str, float]]:
    """Return the median of the rounds of each way, number by number."""
    found: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for run in result["runs"]:
        if run["of"] == of:
            found.setdefault((run["concurrent"], run["threads"]), []).append(run)
    return {
        way: {n: statistics.median(run[n] for run in runs) for n in runs[0] if n != "of"}
        for way, runs in found.items()
    }


def _met(met: bool) -> str:
    return "met" if met else "missed"


def _conditions(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{result['num_trials']} trials of `{result['model']}`, plan {result['plan']}, "
        f"{result['steps']} steps of distillation and of fine-tuning. {machine['cpu']}, "
        f"{machine['num_cores']} cores, {machine['memory_bytes'] / 2**30:.1f} GiB; "
        f"{result['date']}, commit {result['commit']}; medians where there are several rounds."
    )
