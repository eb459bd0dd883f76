# SPDX-License-Identifier: Apache-2.0
"""Measure distillation: against the plain way, against a bare loop of torch, and under ZeRO-3.

    python benchmarks/distill.py                 writes what docs/benchmarks.md shows
    python benchmarks/distill.py --part ways     measures a part of it again
    python benchmarks/distill.py --shape tiny --overhead-shape tiny --results runs    shows it runs

Each run has a process of its own. Without a GPU: a model that steps in a second or two, in fp32.
With one: the sizes of OPT-1.3B and OPT-6.7B in bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
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

import torch

from benchmarks.distill_floor import distill_flops
from benchmarks.distill_page import BEGIN, section, tables
from benchmarks.distill_ways import WEIGHTS, Job
from benchmarks.machine import ROOT, commit, machine
from benchmarks.models import SHAPES, write_model
from benchmarks.page import put
from offsite_ray.results import to_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.models import Shape

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

_SHAPES = {"cpu": ("opt-24x512",), "cuda": ("opt-1.3b", "opt-6.7b")}
_DTYPES = {"cpu": "fp32", "cuda": "bf16"}
_PACKAGES = ("torch", "transformers", "ray", "deepspeed", "numpy")
_PAPER = "30 hidden + lm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """Something that runs the same steps."""

    title: str
    way: str
    num_workers: int = 0
    zero_stage: int = 0


LOOPS = (
    Way(title="bare torch loop", way="bare"),
    Way(title="the loop in this process", way="here"),
    Way(title="Ray Train, DeepSpeed ZeRO 0", way="ray", num_workers=1),
    Way(title="Ray Train, DeepSpeed ZeRO 1", way="ray", num_workers=1, zero_stage=1),
)
"""The first is what the others are compared with."""

STAGES = tuple(
    Way(title=f"ZeRO {stage}", way="ray", num_workers=workers, zero_stage=stage)
    for stage in (0, 3)
    for workers in (1, 2)
)
"""What the memory of each rank is measured for."""


def compare_ways(shape: Shape, args: argparse.Namespace, directory: str) -> list[dict[str, Any]]:
    """Return for each loss what this loop and the plain way take, and the floor of the ratio."""
    ways = ("plain", "shared")
    jobs = {
        (loss, way): _job(args, directory, way=way, loss=loss, steps=args.steps, warmup=args.warmup)
        for loss in WEIGHTS
        for way in ways
    }
    measured = dict(_in_turn(jobs, args.rounds))
    rows = []
    for loss in WEIGHTS:
        flops = {
            way: distill_flops(shape, args.seq_len, args.batch_size, way=way, loss=loss).total
            for way in ways
        }
        plain, shared = (_figures(measured[loss, way]) for way in ways)
        rows.append(
            {
                "loss": loss,
                "plain": plain,
                "shared": shared,
                "flops": flops,
                "floor": flops["plain"] / flops["shared"],
                "throughput": plain["seconds"] / shared["seconds"],
                "throughput_cpu": plain["cpu_seconds"] / shared["cpu_seconds"],
                "memory": plain["memory_bytes"][0] / shared["memory_bytes"][0],
            }
        )
    return rows


def compare_loops(_shape: Shape, args: argparse.Namespace, directory: str) -> list[dict[str, Any]]:
    """Return what the same steps take in each loop."""
    jobs = {
        loop: _job(
            args, directory, way=loop.way, loss=_PAPER, steps=args.overhead_steps, warmup=5,
            num_workers=loop.num_workers, zero_stage=loop.zero_stage, seq_len=args.overhead_seq_len,
        )
        for loop in LOOPS
    }  # fmt: skip
    found = [(loop, _figures(rounds)) for loop, rounds in _in_turn(jobs, args.overhead_rounds)]
    bare = found[0][1]
    kinds = ("seconds", "cpu_seconds", "thread_seconds")
    return [
        {
            "title": loop.title,
            **figures,
            "over_bare": {kind: figures[kind] / bare[kind] - 1 for kind in kinds},
        }
        for loop, figures in found
    ]


def compare_stages(_shape: Shape, args: argparse.Namespace, directory: str) -> list[dict[str, Any]]:
    """Return the memory of each rank, at the same global batch."""
    jobs = {
        stage: _job(
            args, directory, way="ray", loss=_PAPER, steps=1, warmup=0, batch_size=2,
            num_workers=stage.num_workers, zero_stage=stage.zero_stage,
        )
        for stage in STAGES
    }  # fmt: skip
    return [
        {"title": way.title, "num_workers": way.num_workers, **_figures(rounds)}
        for way, rounds in _in_turn(jobs, 1)
    ]


PARTS: dict[str, Callable[[Shape, argparse.Namespace, str], list[dict[str, Any]]]] = {
    "ways": compare_ways,
    "stages": compare_stages,
    "loops": compare_loops,
}
"""What ``--part`` names."""


def _job(args: argparse.Namespace, directory: str, **given: Any) -> Job:
    common = {
        "directory": directory,
        "seq_len": args.seq_len,
        "batch_size": args.batch_size,
        "dtype": _DTYPES[args.device],
        "device": args.device,
    }
    return Job(**{**common, **given})


def _in_turn(jobs: dict[Any, Job], rounds: int) -> Iterator[tuple[Any, list[Any]]]:
    """Yield each name with what its rounds measured; a round runs every job once."""
    found: dict[Any, list[Any]] = {name: [] for name in jobs}
    for number in range(rounds):
        for name, job in jobs.items():
            found[name].append(_in_a_process(job))
            best = min(_seconds(r, "step_seconds") for r in found[name])
            shown = f"{job.way} {job.loss}, {job.num_workers} workers, ZeRO {job.zero_stage}"
            print(f"{shown}, round {number + 1} of {rounds}: {best:.3f} s", file=sys.stderr)
    yield from found.items()


def _in_a_process(job: Job) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.distill_ways", json.dumps(asdict(job))]
    # Ray gives its workers a low priority, which counts where the machine does something else.
    env = {**os.environ, "RAY_worker_niceness": "0"}
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env=env)
    measured: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _figures(rounds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Return the figures of the fastest round, on which the rest of the machine weighed least."""
    best = min(rounds, key=lambda r: _seconds(r, "step_seconds"))
    return {
        "seconds": _seconds(best, "step_seconds"),
        "cpu_seconds": min(_seconds(r, "step_cpu_seconds") for r in rounds),
        "thread_seconds": min(_seconds(r, "step_thread_seconds") for r in rounds),
        "memory_bytes": [m["peak_bytes"] - m["imported_bytes"] for m in best],
        "rounds": list(rounds),
    }


def _seconds(workers: Sequence[dict[str, Any]], kind: str) -> float:
    """Return the median step of the first worker."""
    return float(statistics.median(workers[0][kind]))


def run(args: argparse.Namespace, part: str) -> dict[str, Any]:
    """Measure one part, and say on what."""
    names = (args.overhead_shape,) if part == "loops" else args.shape or _SHAPES[args.device]
    models = []
    for name in names:
        with _written(SHAPES[name], args) as directory:
            rows = PARTS[part](SHAPES[name], args, directory)
        models.append({"shape": to_plain(SHAPES[name]), "rows": rows})
    given = {k: v for k, v in vars(args).items() if k not in ("results", "scratch", "part")}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {**machine(), "gpu": _gpu(args.device)},
        "versions": {"python": platform.python_version(), **{n: version(n) for n in _PACKAGES}},
        "dtype": _DTYPES[args.device],
        "effort": to_plain(given),
        "models": models,
    }


@contextlib.contextmanager
def _written(shape: Shape, args: argparse.Namespace) -> Iterator[str]:
    """Yield a folder with a model and its bundle."""
    with tempfile.TemporaryDirectory(prefix="bench-distill-", dir=args.scratch) as directory:
        write_model(shape, _DTYPES[args.device], f"{directory}/model", f"{directory}/bundle")
        yield directory


def _gpu(device: str) -> str | None:
    return torch.cuda.get_device_name() if device == "cuda" else None


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="by default all")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated")
    parser.add_argument("--overhead-shape", choices=SHAPES, default="opt-8x256")
    parser.add_argument(
        "--device", choices=_DTYPES, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--overhead-seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2, help="processes for each way, in turn")
    parser.add_argument("--overhead-rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=3, help="steps that are, in each process")
    parser.add_argument("--overhead-steps", type=int, default=40)
    parser.add_argument("--scratch", help="directory for the models meanwhile")
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
    args.results.mkdir(parents=True, exist_ok=True)
    out = args.results / f"distill-{args.device}.json"
    for part in args.part or PARTS:
        known = json.loads(out.read_text("utf-8")) if out.exists() else {}
        result = {**known, part: run(args, part)}
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))
    if args.results == RESULTS:
        put(PAGE, BEGIN, section(RESULTS))
    print(f"{out} written", file=sys.stderr)


if __name__ == "__main__":
    main()
