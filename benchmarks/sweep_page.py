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

_WAYS = {0: "one process, without Ray", 1: "Ray Tune, one at a time", 2: "Ray Tune, two at a time"}
_MIB = 2**20


def tables(result: Mapping[str, Any]) -> str:
    """Return the table of every way, and what it says of the bars."""
    runs = {way: _middle(result, way) for way in _WAYS}
    lines = [
        _conditions(result),
        "",
        "| way | all trials | first trial after | a trial | memory at its start | peak of all |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for way, run in runs.items():
        lines.append(
            f"| {_WAYS[way]} | {run['seconds']:.0f} s | {run['first_trial_seconds']:.1f} s | "
            f"{run['trial_seconds']:.1f} s | {run['start_bytes'] / _MIB:.0f} MiB | "
            f"{run['peak_bytes'] / _MIB:.0f} MiB |"
        )
    share = runs[2]["seconds"] / runs[0]["seconds"]
    first = runs[2]["first_trial_seconds"]
    grown = runs[2]["peak_bytes"] - runs[1]["peak_bytes"]
    beyond = grown - runs[2]["start_bytes"]
    lines += [
        "",
        f"Two at a time take {share:.2f} of the time of one process (at most "
        f"{MOST_OF_ONE_PROCESS}: {_met(share <= MOST_OF_ONE_PROCESS)}). The first trial starts "
        f"after {first:.1f} s (at most {MOST_TO_FIRST_TRIAL:.0f} s: "
        f"{_met(first <= MOST_TO_FIRST_TRIAL)}). A second trial at the same time takes "
        f"{grown / _MIB:.0f} MiB, which is {beyond / _MIB:.0f} MiB beyond what its process has "
        f"before it reads a model; an emulator has {runs[2]['bundle_bytes'] / _MIB:.1f} MiB, the "
        f"full model {runs[2]['full_model_bytes'] / _MIB:.1f} MiB.",
        "",
    ]
    return "\n".join(lines)


def _middle(result: Mapping[str, Any], way: int) -> dict[str, float]:
    """Return the median of the rounds of a way, number by number."""
    found = [run for run in result["runs"] if run["concurrent"] == way]
    return {name: statistics.median(run[name] for run in found) for name in found[0]}


def _met(met: bool) -> str:
    return "met" if met else "missed"


def _conditions(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    rounds = len(result["runs"]) // len(_WAYS)
    return (
        f"{result['num_trials']} trials of `{result['model']}`, plan {result['plan']}, "
        f"{result['steps']} steps of distillation and of fine-tuning. {machine['cpu']}, "
        f"{machine['num_cores']} cores, {machine['memory_bytes'] / 2**30:.1f} GiB; "
        f"{result['date']}, commit {result['commit']}; {rounds} "
        f"round{'s' * (rounds > 1)}, medians."
    )
