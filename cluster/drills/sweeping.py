# SPDX-License-Identifier: Apache-2.0
"""A drill while emulators are swept, a trial on each node.

Durable is every trial that has a record. The drill is passed where each keeps it, untouched, and
the sweep ends with all trials finished and the figures of the undisturbed one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from cluster.drills.lab import Lab, Outcome, wait_until
from cluster.local import ROOT
from tests.loops import make_loop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SPACE = {
    "compress": {"plan": ["1-2-1", "adapter=0,2,5 emulator=4"]},
    "distill": {"max_steps": 20, "batch_size": 2},
    "finetune": {"max_steps": 20, "batch_size": 2, "learning_rate": 3e-3},
}
_FIGURES = ("plug_in_nats", "emulator_fine_tuned_nats", "bound_nats")


def worker_killed(lab: Lab) -> Outcome:
    """Kill -9 every process of a node that runs a trial."""
    reference = lab.folder / "undisturbed-sweep"
    if not (reference / "results.parquet").exists():
        with _running(lab, reference) as process:
            _must_end_well(process)
    out = lab.folder / "sweep"
    shutil.rmtree(out, ignore_errors=True)
    with _running(lab, out) as process:
        wait_until(lambda: len(_done(out)) >= 2 and _hit(lab, out) != {}, "two trials and another")
        before = _done(out)
        number, trials = max(_hit(lab, out).items(), key=lambda item: len(item[1]))
        holders = {trial: _holder(out, trial) for trial in trials}
        lab.workers[number].kill()
        killed = time.monotonic()

        def at_work_again() -> bool:
            done = _done(out)
            return all(t in done or _holder(out, t) != pid for t, pid in holders.items())

        whole = wait_until(at_work_again, "the trials that were lost begin again")
        _must_end_well(process)
        took = time.monotonic() - killed
    after = _done(out)
    lost = [f"{t} was done, and is not as it was" for t in before if after.get(t) != before[t]]
    lost += [f"{t} is not as undisturbed" for t in _other(_figures(reference), _figures(out))]
    return Outcome(
        lost=lost,
        cost=f"{len(trials)} of {len(after)} trials begun again",
        whole_after_s=whole,
        numbers={
            "trials": len(after),
            "done_at_kill": len(before),
            "on_the_lost_node": len(trials),
            "ended_after_s": took,
        },
    )


@contextlib.contextmanager
def _running(lab: Lab, out: Path) -> Iterator[subprocess.Popen[str]]:
    loop = lab.folder / "loop"
    if not loop.exists():
        make_loop(loop)
    config = {
        "model": str(loop / "model"), "private": [str(loop / "text.txt")],
        "public": [str(loop / "rows.jsonl")], "text": [str(loop / "text.txt")], "seq_len": 16,
        "space": _SPACE, "retries": 3,
    }  # fmt: skip
    file, log = out.with_suffix(".json"), out.with_suffix(".log")
    file.write_text(json.dumps(config))
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "offsite_ray", "sweep", f"--config={file}", f"--out={out}"],
            cwd=ROOT, env={**lab.head.environment, "RAY_ADDRESS": lab.head.gcs},
            stdout=stream, stderr=stream, text=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _must_end_well(process: subprocess.Popen[str]) -> None:
    wait_until(lambda: process.poll() is not None, "the end of the sweep")
    if process.returncode != 0:
        raise RuntimeError(f"the sweep ended with {process.returncode}")


def _done(out: Path) -> dict[str, int]:
    """Return the trials that have a record, and when it was written."""
    files = (out / "trials").glob("*/result.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in files}


def _holder(out: Path, trial: str) -> int | None:
    """Return the process that is, or was last, at work at a trial."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int((out / "trials" / trial / ".lock").read_text())
    return None


def _hit(lab: Lab, out: Path) -> dict[int, list[str]]:
    """Return the trials that each node is at work at."""
    done = _done(out)
    open_ones = [p.name for p in (out / "trials").glob("*") if p.name not in done]
    found: dict[int, list[str]] = {}
    for number, node in lab.workers.items():
        processes = {process.pid for process in node.processes()}
        trials = [trial for trial in open_ones if _holder(out, trial) in processes]
        if trials:
            found[number] = trials
    return found


def _figures(out: Path) -> dict[str, Any]:
    """Return what each trial has measured, by its name."""
    import pyarrow.parquet as pq

    rows = pq.read_table(out / "results.parquet").to_pylist()
    return {row["id"]: (row["status"], *(row[name] for name in _FIGURES)) for row in rows}


def _other(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Return the names under which two differ."""
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
