# SPDX-License-Identifier: Apache-2.0
"""Measure sweeps: equal trials on Ray Tune beside one process, the first trial, memory of a trial.

    python benchmarks/sweep.py                                 writes what docs/sweeps.md shows
    python benchmarks/sweep.py --steps 2 --results runs        only shows that it runs

The trials differ in their seed alone. Each way is a process of its own, with a directory of its
own; "one process" runs the trials one after the other, with one thread or with all. Memory is that
of trials of a larger model with random weights, so that an emulator stands out from what Python,
torch and the arithmetic take; they train a LoRA, because what trains has gradients and moments too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A script's own folder is all that Python would look in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoints import CHECKPOINTS, write_checkpoint
from benchmarks.machine import ROOT, commit, machine
from benchmarks.page import put
from benchmarks.sweep_page import BEGIN, tables
from offsite_ray.architectures import load_tokenizer
from offsite_ray.results import to_plain

if TYPE_CHECKING:
    from collections.abc import Mapping

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "sweeps.md"

_NUM_TRIALS = 12
_SAMPLE_SECONDS = 0.1
_PARTS = ("time", "memory")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One way to run the trials."""

    of: str
    """What it is measured for: ``time`` or ``memory``."""
    concurrent: int
    """Trials at a time on Ray Tune; 0: one after the other in this process."""
    threads: int
    """Of a process without Ray; a trial of Tune has one for each of its CPUs."""
    model: str
    text: str
    out: str
    num_trials: int
    space: Mapping[str, Any]
    """Of the sweep, a single point."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a way took."""

    of: str
    concurrent: int
    threads: int
    seconds: float
    """From the start of its process to its end."""
    first_trial_seconds: float
    """From the start of its process to that of the first trial."""
    trial_seconds: float
    """Median of the trials."""
    start_bytes: int
    """Of a trial's process, before its first trial has read a model: its own share of memory."""
    peak_bytes: int
    """Most of all trial processes together; a page that n of them share counts 1/n for each."""
    bundle_bytes: int
    full_model_bytes: int


@dataclass(kw_only=True, slots=True)
class Memory:
    """Watches the trials' processes from a thread."""

    folder: Path
    starts: dict[int, int] = field(default_factory=dict)
    peak: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Sample until told to end."""
        while not self.ended.wait(_SAMPLE_SECONDS):
            shares = {pid: share for pid in self._pids() if (share := share_of(pid))}
            for pid, share in shares.items():
                self.starts.setdefault(pid, share)
            self.peak = max(self.peak, sum(shares.values()))

    def _pids(self) -> set[int]:
        texts = [path.read_text("utf-8") for path in self.folder.glob("*/.lock")]
        return {int(text) for text in texts if text}


def share_of(pid: int) -> int | None:
    """Return the bytes of a process: pages that others have too count by their share."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8").splitlines()
    except OSError:
        return None
    (pss,) = (line for line in lines if line.startswith("Pss:"))
    return int(pss.split()[1]) * 1024


def measure(job: Job, start: float) -> Run:
    """Run the trials; ``start`` is when the process began, by ``time.time()``."""
    from offsite_ray.config import SweepConfig
    from offsite_ray.tune.attempts import Silent, run_one_by_one
    from offsite_ray.tune.planned import plan_sweep
    from offsite_ray.tune.search import Listed

    train, test = _texts(job)
    config = SweepConfig(
        model=job.model, private=(train,), public=(train,), text=(test,), out=job.out,
        seq_len=128, dtype="bf16", seeds=job.num_trials, max_concurrent=job.concurrent,
        num_cpus=min(1.0, (os.cpu_count() or 1) / max(1, job.concurrent)), space=job.space,
    )  # fmt: skip
    begun: list[float] = []

    class Watch(Silent):
        def started(self, job: Any) -> None:
            begun.append(time.time() - start)

    planned = plan_sweep(config, Path(job.out), lambda _: None)
    trials = [trial for trial in planned.jobs() if trial.control == "uniform"]
    memory = Memory(folder=planned.folders.trials)
    thread = threading.Thread(target=memory.watch)
    thread.start()
    source = Listed(trials)
    if job.concurrent == 0:
        run_one_by_one(source, planned.shared, Watch(), None, 0)
    else:
        from offsite_ray.tune.on_ray import run_on_tune

        run_on_tune(source, planned.shared, Watch(), None, config, 0)
    memory.ended.set()
    thread.join()
    records = planned.folders.records()
    assert [record["status"] for record in records] == ["finished"] * job.num_trials
    found = records[0]["found"]
    return Run(
        of=job.of,
        concurrent=job.concurrent,
        threads=job.threads,
        seconds=time.time() - start,
        first_trial_seconds=begun[0],
        trial_seconds=statistics.median(record["seconds"]["all"] for record in records),
        start_bytes=round(statistics.mean(memory.starts.values())) if memory.starts else 0,
        peak_bytes=memory.peak,
        bundle_bytes=found["bundle_bytes"],
        full_model_bytes=found["full_model_bytes"],
    )


def _texts(job: Job) -> tuple[str, str]:
    """Write and return a text to train on and one to measure on: two pieces of the job's."""
    words = Path(job.text).read_text("utf-8")
    folder = Path(job.out).parent
    for name, piece in (("train", words[:200_000]), ("test", words[-20_000:])):
        (folder / f"{name}.txt").write_text(piece, "utf-8")
    return str(folder / "train.txt"), str(folder / "test.txt")


def in_own_process(job: Job) -> Run:
    """Run a way in a process of its own."""
    start = time.time()
    words = [sys.executable, __file__, "--job", json.dumps(asdict(job)), "--start", str(start)]
    env = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    # As the command line sets it: threads that spin are slow where another process has the core.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return Run(**json.loads(done.stdout.rstrip().rpartition("\n")[2]))


def main(argv: list[str] | None = None) -> int:
    """Measure every way, write the result and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(_default_model()))
    parser.add_argument("--text", default=str(_default_text()))
    parser.add_argument("--plan", default="2-4-2")
    parser.add_argument("--hidden", type=int, default=1536, help="width of the larger model")
    parser.add_argument("--trials", type=int, default=_NUM_TRIALS)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--of", choices=_PARTS, help="only this; the other is as it was stored")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job:
        run = measure(Job(**json.loads(args.job)), args.start)
        print(json.dumps(asdict(run)))
        return 0
    parts = (args.of,) if args.of else _PARTS
    runs = _stored(args.results, set(_PARTS) - set(parts))
    with tempfile.TemporaryDirectory() as work:
        jobs = [*_timed(args)] if "time" in parts else []
        jobs += _weighed(args, Path(work) / "large") if "memory" in parts else []
        for number, job in enumerate(jobs * args.rounds):
            folder = Path(work) / str(number)
            folder.mkdir()
            runs.append(in_own_process(dataclasses.replace(job, out=str(folder / "out"))))
            shutil.rmtree(folder)
            print(runs[-1], file=sys.stderr, flush=True)
    result = _result(args, runs)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "sweep.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(tables(result))
    if args.results == RESULTS:
        put(PAGE, BEGIN, tables(result))
    return 0


def _stored(results: Path, parts: set[str]) -> list[Run]:
    """Return the runs of some parts that an earlier measurement has stored."""
    if not parts or not (results / "sweep.json").exists():
        return []
    runs = json.loads((results / "sweep.json").read_text("utf-8"))["runs"]
    return [Run(**run) for run in runs if run["of"] in parts]


def _timed(args: argparse.Namespace) -> list[Job]:
    """Return every way to run the trials that are timed."""
    training = {"max_steps": args.steps, "eval_fraction": 0.01}
    job = Job(
        of="time", concurrent=0, threads=1, model=args.model, text=args.text, out="",
        num_trials=args.trials,
        space={
            "compress": {"plan": args.plan},
            "distill": {**training, "learning_rate": 1e-3},
            "finetune": training,
        },
    )  # fmt: skip
    every = dataclasses.replace(job, threads=os.cpu_count() or 1)
    return [job, every, *(dataclasses.replace(job, concurrent=count) for count in (1, 2))]


def _weighed(args: argparse.Namespace, model: Path) -> list[Job]:
    """Return the ways to run the trials whose memory is measured; their model is written."""
    shape = CHECKPOINTS["llama-2-7b"]
    sizes = {
        "vocab_size": load_tokenizer(args.model).vocab_size, "hidden_size": args.hidden,
        "intermediate_size": args.hidden * 11 // 4, "num_hidden_layers": 16,
        "num_attention_heads": 4, "max_position_embeddings": 512,
    }  # fmt: skip
    write_checkpoint(dataclasses.replace(shape, config=sizes), model)
    for file in Path(args.model).glob("tokenizer*"):
        shutil.copy(file, model)
    job = Job(
        of="memory", concurrent=1, threads=1, model=str(model), text=args.text, out="",
        num_trials=4,
        space={
            "compress": {"plan": args.plan},
            "finetune": {"method": "lora", "max_steps": 2, "batch_size": 1, "eval_fraction": 0.01},
        },
    )  # fmt: skip
    return [job, *(dataclasses.replace(job, concurrent=count) for count in (2, 4))]


def _result(args: argparse.Namespace, runs: list[Run]) -> Mapping[str, Any]:
    plain: Mapping[str, Any] = to_plain(
        {
            "machine": machine(),
            "model": Path(args.model).name,
            "plan": args.plan,
            "num_trials": args.trials,
            "hidden": args.hidden,
            "steps": args.steps,
            "runs": runs,
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )
    return plain


def _real(path: str) -> Path:
    return Path(os.environ.get("OFFSITE_RAY_REAL_DATA", ROOT.parent / "shared")) / path


def _default_model() -> Path:
    real = _real("models/fm16")
    return real if real.is_dir() else ROOT / "examples" / "foundation"


def _default_text() -> Path:
    real = _real("data/shakespeare/input.txt")
    return real if real.is_file() else ROOT / "docs" / "benchmarks.md"


if __name__ == "__main__":
    sys.exit(main())
