# SPDX-License-Identifier: Apache-2.0
"""What the sweeps of docs/fm16 found, method by method, in the pages of the methods.

python benchmarks/methods_page.py SWEEP NAME      takes over the results of a sweep, as NAME
python benchmarks/methods_page.py                 writes the tables of those in docs/fm16
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A script's own folder is all that Python would look in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow.parquet as pq

from benchmarks.machine import ROOT
from benchmarks.page import put

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

FOLDER = ROOT / "docs" / "fm16"
BEGIN = "<!-- begin: written by benchmarks/methods_page.py -->"
NAMES = {"shakespeare": "Shakespeare", "arc_easy": "ARC-Easy"}
"""Name of a sweep's files to the text that its adapters were fine-tuned on."""

_PLAN = "2-4-2"
_ADAPTER = "0,1,14,15"
"""The adapter blocks of that plan in a model of 16."""
_MIB = 2**20

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Methods that a page compares at the same plan, all else equal."""

    page: str
    heading: str
    """Of the first column."""
    label: Callable[[Row], str]
    belongs: Callable[[Row], bool]
    against: str
    """Label of the row that the others are compared with."""


def _compress(row: Row) -> Mapping[str, Any]:
    settings: Mapping[str, Any] = json.loads(row["settings"])["compress"]
    return settings


def _undistilled(row: Row) -> bool:
    return not row["distill_steps"] and _compress(row).get("plan") == _PLAN


def _losses(row: Row) -> str:
    """Return how an emulator was distilled, in words."""
    if not row["distill_steps"]:
        return "not distilled"
    given = json.loads(row["settings"])["distill"]
    weights = {"hidden": 30.0, "layerwise": 0.0, "logits": 0.0, "lm": 1.0}
    weights = {name: given.get(f"{name}_weight", weight) for name, weight in weights.items()}
    words = " + ".join(
        name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items() if weight
    )
    return f"{words}, {row['distill_steps']} steps"


_FAMILIES = (
    Family(
        page="selection.md",
        heading="`--select`",
        label=lambda row: (
            f"{row['select']} (as deep as the full model)"
            if row["depth"] > row["num_adapter_blocks"] + row["num_emulator_blocks"]
            else str(row["select"])
        ),
        belongs=lambda row: (
            _undistilled(row) and row["compress"] == "none" and row["method"] == "full"
        ),
        against="uniform",
    ),
    Family(
        page="compression.md",
        heading="`--compress`, of a uniform drop",
        label=lambda row: row["compress"],
        belongs=lambda row: (
            _undistilled(row) and row["select"] == "uniform" and row["method"] == "full"
        ),
        against="none",
    ),
    Family(
        page="distillation.md",
        heading="a uniform drop, distilled by",
        label=_losses,
        belongs=lambda row: (
            _compress(row)["plan"] == _PLAN
            and (row["select"], row["compress"], row["method"]) == ("uniform", "none", "full")
        ),
        against="not distilled",
    ),
    Family(
        page="fm16.md",
        heading="plan, of a uniform drop",
        label=lambda row: f"{row['plan']}, {_losses(row)}",
        belongs=lambda row: (
            (row["select"], row["compress"], row["method"]) == ("uniform", "none", "full")
        ),
        against="2-4-2, not distilled",
    ),
    Family(
        page="finetuning.md",
        heading="`--method`",
        label=lambda row: row["method"],
        belongs=lambda row: (
            _undistilled(row) and (row["select"], row["compress"]) == ("uniform", "none")
        ),
        against="full",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Take over a sweep where one is named; write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", nargs="?", type=Path)
    parser.add_argument("name", nargs="?", choices=NAMES)
    args = parser.parse_args(argv)
    if args.sweep:
        FOLDER.mkdir(exist_ok=True)
        for name, suffix in (("results.parquet", ".parquet"), ("report.html", ".html")):
            shutil.copyfile(args.sweep / name, FOLDER / f"{args.name}{suffix}")
    tables = {
        title: pq.read_table(FOLDER / f"{name}.parquet").to_pylist()
        for name, title in NAMES.items()
        if (FOLDER / f"{name}.parquet").exists()
    }
    for family in _FAMILIES:
        put(ROOT / "docs" / family.page, BEGIN, section(family, tables))
    return 0


def section(family: Family, tables: Mapping[str, Sequence[Row]]) -> str:
    """Return the tables of a family of methods, one for each sweep that compared some."""
    parts = []
    for title, rows in tables.items():
        points = by_label(family, rows)
        if len(points) > 1:
            parts += [_yardsticks(title, rows), "", *_table(family, points), ""]
    return "\n".join(parts) or "Not measured.\n"


def by_label(family: Family, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the measured rows of a family by label, that of each seed once."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["role"] == "emulator" and row["status"] == "finished" and family.belongs(row):
            found.setdefault(family.label(row), {})[row["seed"]] = row
    return {label: [of[seed] for seed in sorted(of)] for label, of in found.items()}


def _yardsticks(title: str, rows: Sequence[Row]) -> str:
    full = next(row for row in rows if row["role"] == "full")["full_zero_shot_nats"]
    bounds = [r for r in rows if r["role"] == "bound" and r["method"] == "full"]
    mine = [row for row in bounds if row["adapter_blocks"] == _ADAPTER]
    rates = {row["learning_rate"] for row in mine}
    tuned = [
        row["full_fine_tuned_nats"]
        for row in rows
        if row["role"] == "fine_tuned" and row["learning_rate"] in rates
    ]
    return (
        f"**{title}**, nats per token, mean and standard deviation over seeds: full model "
        f"{full:.3f}; full fine-tuning {_spread(tuned)}; bound "
        f"{_of(mine, 'bound_nats')}."
    )


def _table(family: Family, points: Mapping[str, list[Row]]) -> Iterator[str]:
    yield (
        f"| {family.heading} | MiB | emulator zero-shot | emulator fine-tuned | plug-in | "
        f"better than {family.against} | of the bound's gain | utility gap | privacy gap | "
        "makes it in |"
    )
    yield "| --- |" + " --: |" * 9
    base = {row["seed"]: row["plug_in_nats"] for row in points[family.against]}
    ordered = sorted(points.items(), key=lambda item: _mean(item[1], "plug_in_nats"))
    for label, rows in ordered:
        better = [base[row["seed"]] - row["plug_in_nats"] for row in rows if row["seed"] in base]
        seconds = [(r["compress_seconds"] or 0) + (r["distill_seconds"] or 0) for r in rows]
        yield " | ".join(
            (
                f"| {label}",
                f"{_mean(rows, 'bundle_bytes') / _MIB:.1f}",
                *(
                    _of(rows, f"{name}_nats")
                    for name in ("emulator_zero_shot", "emulator_fine_tuned", "plug_in")
                ),
                "" if label == family.against else f"{_spread(better, sign='+')}",
                f"{100 * _mean(rows, 'bound_share'):.0f}%",
                _of(rows, "utility_gap", sign="+"),
                _of(rows, "privacy_gap", sign="+"),
                f"{statistics.median(seconds):.1f} s |",
            )
        )


def _mean(rows: Sequence[Row], name: str) -> float:
    return statistics.mean([float(row[name]) for row in rows])


def _of(rows: Sequence[Row], name: str, sign: str = "") -> str:
    return _spread([row[name] for row in rows], sign)


def _spread(values: Sequence[float], sign: str = "") -> str:
    mean = format(statistics.mean(values), f"{sign}.3f")
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


if __name__ == "__main__":
    sys.exit(main())
