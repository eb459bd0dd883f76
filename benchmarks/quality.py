# SPDX-License-Identifier: Apache-2.0
"""Measure what distillation does for the plug-in, on a pretrained model and real text.

    python benchmarks/quality.py                   writes what docs/benchmarks.md shows
    python benchmarks/quality.py --stored          shows what a run that was stopped has stored

Needs models/fm16, data/wikitext2 and data/shakespeare in the folder OFFSITE_RAY_REAL_DATA (default
../shared). Each cell is stored when it is done: the next run goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A script's own folder is all that Python would look in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.machine import ROOT, commit, machine
from benchmarks.page import put
from benchmarks.quality_cells import LOSSES, UNDISTILLED, Laboratory, Recipe
from benchmarks.quality_page import BEGIN, tables
from offsite_ray.results import to_plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.quality_cells import Cell

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

MODEL = Path("models/fm16")
PUBLIC = Path("data/wikitext2/valid.txt")
TEXTS = {
    "Shakespeare": Path("data/shakespeare/input.txt"),
    "WikiText-2 test": Path("data/wikitext2/test.txt"),
}

_PACKAGES = ("torch", "transformers", "numpy")


def real_data() -> Path:
    """Return the folder of real models and texts."""
    return Path(os.environ.get("OFFSITE_RAY_REAL_DATA", ROOT.parent / "shared")).resolve()


def missing(root: Path) -> list[str]:
    """Return what is needed and not there."""
    return [str(path) for path in (MODEL, PUBLIC, *TEXTS.values()) if not (root / path).exists()]


def measure(laboratory: Laboratory) -> dict[str, Any]:
    """Make every cell: first what the table needs, seed by seed, then the course over tokens."""
    recipe = laboratory.recipe
    pilots: dict[str, dict[str, Cell | None]] = {
        loss: {f"{rate:g}": laboratory.pilot(loss, rate) for rate in recipe.rates}
        for loss in LOSSES
    }
    rates = {loss: _best_rate(found) for loss, found in pilots.items()}
    full = {text: laboratory.full_zero_shot(text) for text in TEXTS}
    bound = {text: laboratory.tune("bound", text, 0) for text in TEXTS}
    distilled: dict[str, dict[str, Cell | None]] = {loss: {} for loss in LOSSES}
    tuned: dict[str, Any] = {loss: {text: {} for text in TEXTS} for loss in (UNDISTILLED, *LOSSES)}
    for seed in recipe.seeds:
        for loss, of_texts in tuned.items():
            rate = rates.get(loss)
            if rate is not None:
                distilled[loss][str(seed)] = laboratory.distil(loss, seed, rate)
            for text, found in of_texts.items():
                found[str(seed)] = laboratory.tune(loss, text, seed, recipe.distill_steps)
    return {
        "pilots": pilots,
        "rates": rates,
        "full_zero_shot": full,
        "bound": bound,
        "distilled": distilled,
        "tuned": tuned,
        "course": _course(laboratory),
    }


def _best_rate(found: Mapping[str, Cell | None]) -> float | None:
    known = {rate: cell["nats"] for rate, cell in found.items() if cell is not None}
    return float(min(known, key=known.__getitem__)) if known else None


def _course(laboratory: Laboratory) -> dict[str, Any]:
    """Return tuned cells after fewer steps of distillation: steps to loss to text to seed."""
    recipe = laboratory.recipe
    return {
        str(steps): {
            loss: {
                text: {
                    str(seed): laboratory.tune(loss, text, seed, steps)
                    for seed in recipe.course_seeds
                }
                for text in TEXTS
            }
            for loss in LOSSES
        }
        for steps in recipe.marks[:-1]
    }


def _laboratory(args: argparse.Namespace, recipe: Recipe) -> Laboratory:
    root, start = real_data(), time.perf_counter()
    if absent := missing(root):
        raise SystemExit(
            f"{root} lacks {', '.join(absent)}: nothing is measured; set OFFSITE_RAY_REAL_DATA to "
            "the folder that has them"
        )

    def tell(line: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {line}", file=sys.stderr, flush=True)

    texts = {name: root / path for name, path in TEXTS.items()}
    work = args.work or Path(tempfile.gettempdir()) / f"offsite-ray-quality-{_digest(recipe)}"
    return Laboratory(
        recipe, root / MODEL, texts, root / PUBLIC, work, None if args.stored else tell
    )


def _digest(recipe: Recipe) -> str:
    return hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, or collect what was; say on what."""
    recipe = dataclasses.replace(Recipe(), **json.loads(args.recipe))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {**machine(), "num_threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **{n: version(n) for n in _PACKAGES}},
        "recipe": to_plain(recipe),
        "tokens": {str(mark): recipe.tokens(mark) for mark in recipe.marks},
        "tune_tokens": recipe.tokens(recipe.tune_steps),
        **measure(_laboratory(args, recipe)),
    }


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stored", action="store_true", help="measure nothing more")
    parser.add_argument("--recipe", default="{}", help="fields of Recipe that differ, as JSON")
    parser.add_argument(
        "--work", type=Path, help="folder for the cells; by default a temporary one"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="directory for the JSON; any but the default leaves docs/benchmarks.md as it is",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, write the result, update the page and print the tables."""
    args = _parse(argv)
    result = run(args)
    args.results.mkdir(parents=True, exist_ok=True)
    out = args.results / "quality.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))
    if args.results == RESULTS:
        put(PAGE, BEGIN, tables(result))
    print(f"{out} written", file=sys.stderr)


if __name__ == "__main__":
    main()
