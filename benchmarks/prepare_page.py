# SPDX-License-Identifier: Apache-2.0
"""What was measured of prepare as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

BEGIN = "<!-- begin: written by benchmarks/prepare.py -->"

_MIB = 2**20


def tables(result: Mapping[str, Any]) -> str:
    """Return on what it was measured, then a table of throughput and one of memory."""
    return "\n".join([_conditions(result), _speed(result), _memory(result)])


def best(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fastest run of a row: what others do on the machine only takes from it."""
    fastest: Mapping[str, Any] = min(row["runs"], key=lambda run: run["seconds"])
    return fastest


def _conditions(result: Mapping[str, Any]) -> str:
    host = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    loads = [run["load"][0] for row in result["rows"] for run in row["runs"]]
    return (
        f"{host['cpu']}, {host['num_cores']} cores, {host['memory_bytes'] / 2**30:.1f} GiB, "
        f"{host['system']}; {versions}; {result['date']}, commit {result['commit'] or 'unknown'}. "
        f"JSONL of {result['text']}, blocks of {result['block_size']} tokens. The best of "
        f"{len(result['rows'][0]['runs'])} runs, in turn; the load of the machine before a run was "
        f"{min(loads):.1f} to {max(loads):.1f}.\n"
    )


def _speed(result: Mapping[str, Any]) -> str:
    head = (
        "throughput", "text", "tokens", "seconds", "tokens/s", "x one process", "CPU", "start-up",
    )  # fmt: skip
    alone = {
        row["text_bytes"]: best(row)["seconds"] for row in result["rows"] if row["num_workers"] == 0
    }
    rows = [
        (
            _way(row),
            _mib(row["text_bytes"]),
            f"{best(row)['num_tokens'] / 1e6:.1f} M",
            f"{best(row)['seconds']:.1f}",
            f"{best(row)['num_tokens'] / best(row)['seconds']:,.0f}",
            f"{alone[row['text_bytes']] / best(row)['seconds']:.2f}",
            f"{best(row)['cpu_seconds']:.1f} s",
            f"{min(run['start_seconds'] for run in row['runs']):.1f} s",
        )
        for row in result["rows"]
    ]
    return _table(head, rows)


def _memory(result: Mapping[str, Any]) -> str:
    head = ("peak memory", "text", "process", "worker", "reading", "opening", "a block")
    rows = [
        (
            _way(row),
            _mib(row["text_bytes"]),
            _mib(max(run["process_bytes"] for run in row["runs"])),
            _mib(max(max(run["worker_bytes"]) for run in row["runs"]))
            if row["num_workers"]
            else "-",
            _mib(max(run["read_bytes"] for run in row["runs"])),
            f"{min(run['open_seconds'] for run in row['runs']):.2f} s",
            f"{min(run['read_seconds'] for run in row['runs']) * 1e3:.2f} ms",
        )
        for row in result["rows"]
    ]
    return _table(head, rows)


def _way(row: Mapping[str, Any]) -> str:
    return f"{row['num_workers']} workers" if row["num_workers"] else "one process"


def _mib(value: int) -> str:
    return f"{value / _MIB:,.0f} MiB"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    marks = ["---", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, marks, *rows))
