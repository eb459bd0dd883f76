# SPDX-License-Identifier: Apache-2.0
"""What drills found, as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.page import table

if TYPE_CHECKING:
    from collections.abc import Mapping

BEGIN = "<!-- begin: written by cluster/drills -->"


def tables(result: Mapping[str, Any]) -> str:
    """Return on what the drills were run, and a row for each."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    dates = sorted({one["date"] for one in result["drills"]})
    commits = sorted({one["commit"] or "unknown" for one in result["drills"]})
    head = (
        f"{machine['cpu']}, {machine['num_cores']} cores, {machine['memory_bytes'] / 2**30:.1f} "
        f"GiB, {machine['system']}; {versions}; nodes in {result['network']}; "
        f"{' to '.join(dates[:1] + dates[1:][-1:])}, commit {', '.join(commits)}.\n\n"
    )
    rows = [
        (one["name"], one["done"], _lost(one), one["cost"] or "", _whole(one), one["whole"])
        for one in result["drills"]
    ]
    names = ("drill", "what is done", "lost", "cost", "whole after", "whole is")
    return head + table(names, rows).replace("--:", "---")


def _lost(one: Mapping[str, Any]) -> str:
    if one["not_run"]:
        return f"not run: {one['not_run']}"
    if one["failed"]:
        return f"did not end: {one['failed'].splitlines()[0]}"
    return "; ".join(dict.fromkeys(one["lost"])) or "nothing"


def _whole(one: Mapping[str, Any]) -> str:
    if one["not_run"] or one["failed"]:
        return "not measured"
    seconds = one["whole_after_s"]
    return "at once" if seconds is None else f"{seconds:.0f} s"
