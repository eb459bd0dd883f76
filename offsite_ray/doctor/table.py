# SPDX-License-Identifier: Apache-2.0
"""Facts and findings for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offsite_ray.doctor.checks import examined
from offsite_ray.results import bytes_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Group

    from offsite_ray.doctor.checks import Finding
    from offsite_ray.doctor.facts import Facts

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "not measured": "dim"}


def tables(facts: Sequence[Facts], findings: Sequence[Finding]) -> Group:
    """Return a table of the nodes above one of what was found."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    nodes = Table(*("node", *_COLUMNS))
    for one in examined(facts):
        nodes.add_row(Text(one.node), *(Text(cell(one)) for cell in _COLUMNS.values()))
    checks = Table("check", "verdict", "where")
    for column in ("found", "how to mend it"):
        checks.add_column(column, overflow="fold")  # paths are for reading
    for finding in findings:
        where, mend = ", ".join(finding.nodes), finding.mend or ""
        verdict = Text(finding.verdict, _STYLES[finding.verdict])
        checks.add_row(finding.check, verdict, *map(Text, (where, finding.found, mend)))
    return Group(nodes, checks)


def _free(free: int | None, total: int | None) -> str:
    if free is None or total is None:
        return "not measured"
    return f"{bytes_text(free)} of {bytes_text(total)}"


def _gpus(facts: Facts) -> str:
    if not facts.gpus:
        return "not measured" if facts.num_torch_gpus is None else str(facts.num_torch_gpus)
    return "\n".join(f"{gpu.name}, {_free(gpu.free_bytes, gpu.total_bytes)}" for gpu in facts.gpus)


def _disk(facts: Facts) -> str:
    if not facts.disks:
        return "not measured"
    least = min(facts.disks, key=lambda disk: disk.free_bytes)
    return _free(least.free_bytes, least.total_bytes)


def _clock(facts: Facts) -> str:
    if facts.clock_ahead_s is None or facts.round_trip_s is None:
        return "not measured"
    return f"{facts.clock_ahead_s:+.3f} s, known to {facts.round_trip_s:.3f} s"


_COLUMNS: dict[str, Callable[[Facts], str]] = {
    "CPUs": lambda facts: "not measured" if facts.num_cpus is None else f"{facts.num_cpus:g}",
    "free memory": lambda facts: _free(facts.free_memory_bytes, facts.memory_bytes),
    "GPUs, free memory": _gpus,
    "least free disk": _disk,
    "clock ahead by": _clock,
}
