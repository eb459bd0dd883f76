# SPDX-License-Identifier: Apache-2.0
"""Measure prepare: one process beside two Ray Data workers, and memory while the text grows.

    python benchmarks/prepare.py                           writes what docs/benchmarks.md shows
    python benchmarks/prepare.py --mib 1 --results runs    a minute; only shows that it runs

The text is made of stretches of a real one, where OFFSITE_RAY_REAL_DATA has it, and else of made-up
words. Each run is a process of its own, with one thread for the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A script's own folder is all that Python would look in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import ROOT, commit, machine
from benchmarks.page import put
from benchmarks.prepare_page import BEGIN, tables
from benchmarks.prepare_run import Job, Run
from offsite_ray.results import to_plain

if TYPE_CHECKING:
    from collections.abc import Mapping

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
TOKENIZER = ROOT / "examples" / "foundation"

_WORKERS = (0, 2)
_GROWTH = 10
_PACKAGES = ("ray", "pyarrow", "tokenizers", "transformers", "numpy")
_TEXTS = ("data/wikitext2/valid.txt", "data/shakespeare/input.txt")
_MEAN_WORDS = 180
"""Of a document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way to prepare one text."""

    num_workers: int
    """0: one process, without Ray."""
    text_bytes: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run of this script measured, and on what."""

    date: str
    """ISO 8601, UTC."""
    commit: str | None
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    text: str
    """What the text was made of."""
    block_size: int
    rows: tuple[Row, ...]


def measure(args: argparse.Namespace, scratch: Path) -> Result:
    """Measure both ways on a text, in turn, and once each on one that is larger."""
    words, made_of = _words()
    sizes = [args.mib * 2**20, args.mib * 2**20 * _GROWTH]
    files = [_text(scratch / f"{size}.jsonl", words, size) for size in sizes]
    small = _text(scratch / "small.jsonl", words, 2**19)
    runs: dict[tuple[int, int], list[Run]] = {}
    for size, file, rounds in zip(sizes, files, (args.rounds, args.rounds), strict=True):
        for _ in range(rounds):
            for workers in _WORKERS:
                run = _run(file, small, args.block_size, workers, scratch)
                runs.setdefault((workers, size), []).append(run)
                _say(f"{size / 2**20:.0f} MiB, {workers or 'no'} workers: {run}")
    return Result(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        machine=machine(),
        versions={"python": platform.python_version(), **{n: version(n) for n in _PACKAGES}},
        text=made_of,
        block_size=args.block_size,
        rows=tuple(
            Row(num_workers=workers, text_bytes=size, runs=tuple(some))
            for (workers, size), some in runs.items()
        ),
    )


def _run(source: Path, small: Path, block_size: int, num_workers: int, scratch: Path) -> Run:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        job = Job(
            source=str(source),
            small_source=str(small),
            tokenizer=str(TOKENIZER),
            block_size=block_size,
            num_workers=num_workers,
            out=str(Path(folder) / "out"),
        )
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.prepare_run", json.dumps(asdict(job))],
            cwd=ROOT,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    plain = json.loads(done.stdout.splitlines()[-1])
    return Run(**{**plain, "worker_bytes": tuple(plain["worker_bytes"])})


def _words() -> tuple[list[str], str]:
    real = Path(os.environ.get("OFFSITE_RAY_REAL_DATA", ROOT.parent / "shared"))
    files = [real / name for name in _TEXTS]
    if all(file.is_file() for file in files):
        words = [word for file in files for word in file.read_text("utf-8").split()]
        return words, "stretches of 5 to 30 words of WikiText-2 and Shakespeare"
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    vocabulary = ["".join(draw.choices(letters, k=draw.randrange(1, 12))) for _ in range(30_000)]
    weights = [1 / rank for rank in range(1, len(vocabulary) + 1)]
    return draw.choices(vocabulary, weights, k=500_000), "made-up words"


def _text(file: Path, words: list[str], size: int) -> Path:
    """Write documents as JSONL, of about so many bytes."""
    draw = random.Random(size)
    written = 0
    with file.open("w", encoding="utf-8") as stream:
        while written < size:
            wanted = 5 + int(draw.expovariate(1 / _MEAN_WORDS))
            document: list[str] = []
            while len(document) < wanted:
                start, length = draw.randrange(len(words)), draw.randrange(5, 31)
                document += words[start : start + length]
            written += stream.write(json.dumps({"text": " ".join(document)}) + "\n")
    return file


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Measure, write the result, update the page and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=24, help="size of the smaller text")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way on it, in turn")
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--scratch", help="directory for the texts and blocks meanwhile, 1 GB")
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="directory for the JSON; any but the default leaves docs/benchmarks.md as it is",
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        result = to_plain(measure(args, Path(scratch)))
    args.results.mkdir(parents=True, exist_ok=True)
    out = args.results / "prepare.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))
    if args.results == RESULTS:
        put(PAGE, BEGIN, tables(result))
    _say(f"{out} written")


if __name__ == "__main__":
    main()
