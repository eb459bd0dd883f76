# SPDX-License-Identifier: Apache-2.0
"""Measure fine-tuning: full, LoRA, offsite-tuning and both together, against the floor.

    python benchmarks/finetune.py                               writes what docs/benchmarks.md shows
    python benchmarks/finetune.py --shape tiny --results runs   a minute; only shows that it runs

Each way runs in processes of its own. Without a GPU: one model, in fp32 and in bf16. With one: the
sizes of OPT-1.3B and GPT2-XL in bf16.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A script's own folder is all that Python would look in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.cases import ITEMSIZE, LORA_RANK, ROOT, Comparison, Effort, compare
from benchmarks.machine import commit, machine
from benchmarks.models import SHAPES
from benchmarks.page import tables, update
from offsite_ray.results import to_plain

if TYPE_CHECKING:
    from collections.abc import Mapping

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

_DEFAULT_SHAPES = {"cpu": ("opt-24x1024",), "cuda": ("opt-1.3b", "gpt2-xl")}
_DEFAULT_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
_PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run of this script measured, and on what."""

    date: str
    """ISO 8601, UTC."""
    commit: str | None
    """Of the working tree; None outside git."""
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    lora_rank: int
    effort: Effort
    comparisons: tuple[Comparison, ...]


def run(args: argparse.Namespace) -> Result:
    """Measure everything that was asked for."""
    effort = Effort(
        device=args.device,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        rounds=args.rounds,
        warmup=args.warmup,
        steps=args.steps,
    )
    comparisons = [
        compare(SHAPES[shape], dtype, effort, args.scratch)
        for shape in args.shape or _DEFAULT_SHAPES[args.device]
        for dtype in args.dtype or _DEFAULT_DTYPES[args.device]
    ]
    return Result(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        machine={**machine(), "gpu": _gpu(args.device)},
        versions={"python": platform.python_version(), **{n: version(n) for n in _PACKAGES}},
        lora_rank=LORA_RANK,
        effort=effort,
        comparisons=tuple(comparisons),
    )


def _gpu(device: str) -> str | None:
    return torch.cuda.get_device_name() if device == "cuda" else None


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated")
    parser.add_argument("--dtype", action="append", choices=ITEMSIZE, help="may be repeated")
    parser.add_argument(
        "--device",
        choices=_DEFAULT_SHAPES,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="by default the GPU, where there is one",
    )
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2, help="processes for each way, in turn")
    parser.add_argument("--warmup", type=int, default=1, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=3, help="steps that are, in each process")
    parser.add_argument("--scratch", help="directory for the models meanwhile, up to 6 GB")
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
    result = to_plain(run(args))
    args.results.mkdir(parents=True, exist_ok=True)
    out = args.results / f"finetune-{args.device}.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))
    if args.results == RESULTS:
        update(PAGE, RESULTS)
    print(f"{out} written", file=sys.stderr)


if __name__ == "__main__":
    main()
