# SPDX-License-Identifier: Apache-2.0
"""Drills while a model is distilled on two workers, by the command that a user gives.

Durable is what the run has reported: its checkpoints, and in the end the bundle. A drill is passed
where the run goes on from no earlier than the last of them, and ends with the undisturbed run's
bytes.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.drills import disks
from cluster.drills.lab import Lab, Outcome, wait_until
from cluster.local import ROOT
from tests.loops import make_loop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STEPS = 120
EVERY = 10
"""Steps from one checkpoint to the next."""
_FLAGS = {
    "max_steps": STEPS,
    "checkpoint_every": EVERY,
    "eval_every": STEPS,
    "batch_size": 4,
    "seq_len": 32,
    "learning_rate": 3e-3,
    "num_workers": 2,
    "zero_stage": 2,
}
_CUT_S = 20.0
_SLOW_BYTES_PER_S = 512 * 1024
_DISK_BYTES = 96 * 2**20


@dataclass(kw_only=True)
class Run:
    """A distillation at work, and what it has reported so far."""

    process: subprocess.Popen[str]
    out: Path
    log: Path
    said: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)
    """When we saw it, the kind of record, and its values."""
    _read: int = 0
    _inode: int | None = None

    @property
    def run_dir(self) -> Path:
        """Where it keeps what it needs to go on."""
        return self.out.parent / f".{self.out.name}.run"

    def look(self) -> None:
        """See what it has reported since."""
        with (
            contextlib.suppress(FileNotFoundError),
            (self.run_dir / "records.jsonl").open("rb") as records,
        ):
            if (inode := os.fstat(records.fileno()).st_ino) != self._inode:
                self._inode, self._read = inode, 0
                self.said.clear()  # of the command before, whose file was still there
            records.seek(self._read)
            for line in records:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                with contextlib.suppress(ValueError):  # half a line, or none
                    kind, values = json.loads(line)
                    self.said.append((time.monotonic(), kind, values))

    def of(self, kind: str, since: float = 0.0) -> list[tuple[float, dict[str, Any]]]:
        """Return the records of a kind, and when each was seen."""
        return [(seen, values) for seen, name, values in self.said if name == kind and seen > since]

    @property
    def step(self) -> int:
        """The step that was done last."""
        return max((values["step"] for _, values in self.of("StepRecord")), default=0)

    @property
    def durable(self) -> int:
        """Steps of the last checkpoint that was reported."""
        return max((values["step"] for _, values in self.of("CheckpointRecord")), default=0)

    def trained_s(self) -> float:
        """Return the seconds since its first step."""
        return time.monotonic() - self.of("StepRecord")[0][0]

    def reach(self, step: int) -> None:
        """Wait until so many steps are done, and a checkpoint of some is reported."""

        def there() -> bool:
            self.look()
            if self.process.poll() is not None:
                raise RuntimeError(f"the run has ended early:\n{self.log.read_text()[-3000:]}")
            return self.step >= step and self.durable > 0

        wait_until(there, f"step {step}")

    def end(self) -> int:
        """Wait until it has ended; return its exit status."""

        def ended() -> bool:
            self.look()
            return self.process.poll() is not None

        wait_until(ended, "the end of the run")
        return self.process.wait()


@contextlib.contextmanager
def running(lab: Lab, out: Path, **changes: Any) -> Iterator[Run]:
    """Distil a tiny model on the cluster, until the block ends."""
    loop = lab.folder / "loop"
    if not loop.exists():
        make_loop(loop)
    given = {"model": loop / "model", "bundle": loop / "bundle", "data": loop / "text.txt"}
    words = [f"--{k.replace('_', '-')}={v}" for k, v in {**_FLAGS, **given, **changes}.items()]
    log = lab.folder / "distill.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "offsite_ray", "distill", *words, f"--out={out}", "--resume"],
            cwd=ROOT, env={**lab.head.environment, "RAY_ADDRESS": lab.head.gcs},
            stdout=stream, stderr=stream, text=True,
        )  # fmt: skip
    try:
        yield Run(process=process, out=out, log=log)
    finally:
        process.kill()
        process.wait()


def undisturbed(lab: Lab) -> tuple[Path, float]:
    """Return what the run makes that nothing happens to, and its seconds from the first step on."""
    out, note = lab.folder / "undisturbed", lab.folder / "undisturbed.json"
    if not note.exists():
        with running(lab, out) as run:
            _must_end_well(run)
        note.write_text(json.dumps(run.trained_s()))
    return out, json.loads(note.read_text())


def worker_killed(lab: Lab) -> Outcome:
    """Kill -9 every process of a node that trains."""
    reference, _ = undisturbed(lab)
    with _fresh(lab) as out, running(lab, out) as run:
        run.reach(3 * EVERY)
        number = lab.nodes_with("RayTrainWorker")[-1]
        lab.workers[number].kill()
        run.look()
        killed, done, durable = time.monotonic(), run.step, run.durable
        _must_end_well(run)
        starts = [values["first_step"] for _, values in run.of("RunStart", killed)]
        again = [seen for seen, values in run.of("StepRecord", killed) if values["step"] > done]
        began = min((seen for seen, _ in run.of("RunStart", killed)), default=None)
        lost = [*_went_back(starts, durable), *_differs(out, reference)]
    if began is None:
        raise RuntimeError("the run has not noticed; it was over before the node was lost")
    return Outcome(
        lost=lost,
        cost=f"{_done_again(run, killed)} steps done again",
        whole_after_s=again[0] - killed,
        numbers={
            "step_at_kill": done,
            "reported_checkpoint": durable,
            "went_on_from": starts,
            "training_again_after_s": began - killed,
        },
    )


def cut_off(lab: Lab) -> Outcome:
    """Pull the cable of a node that trains, for 20 seconds."""
    assert lab.network is not None
    reference, _ = undisturbed(lab)
    with _fresh(lab) as out, running(lab, out) as run:
        run.reach(3 * EVERY)
        number = lab.nodes_with("RayTrainWorker")[-1]
        with lab.network.cut(number):
            cut = time.monotonic()
            time.sleep(1)  # what was on the way
            run.look()
            done, durable = run.step, run.durable
            time.sleep(_CUT_S - 1)
            run.look()
            stood_still = run.step == done
        _must_end_well(run)
        starts = [values["first_step"] for _, values in run.of("RunStart", cut)]
        again = [seen for seen, values in run.of("StepRecord", cut) if values["step"] > done]
        lost = [*_went_back(starts, durable), *_differs(out, reference)]
    return Outcome(
        lost=lost,
        cost=f"{_CUT_S:g} s of waiting, {_done_again(run, cut)} steps done again",
        whole_after_s=again[0] - cut - _CUT_S,
        numbers={
            "step_at_cut": done,
            "reported_checkpoint": durable,
            "went_on_from": starts,
            "stood_still": stood_still,
            "nodes_alive_after": len(lab.head.nodes()),
        },
    )


def storage_full(lab: Lab) -> Outcome:
    """Fill the disk that checkpoints go to; make room, and give the same command again."""
    reference, _ = undisturbed(lab)
    with disks.disk(lab.folder / "small.img", _DISK_BYTES) as disk:
        out = disk / "out"
        with running(lab, out) as run:
            run.reach(3 * EVERY)
            filler = disks.fill(disk)
            filled = time.monotonic()
            status = run.end()
            told = time.monotonic() - filled
            durable, said = run.durable, run.log.read_text().strip().splitlines()[-1]
        filler.unlink()
        room = time.monotonic()
        with running(lab, out) as again:
            _must_end_well(again)
        whole = again.of("StepRecord")[0][0] - room
        starts = [values["first_step"] for _, values in again.of("RunStart")]
        lost = [*_went_back(starts, durable), *_differs(out, reference)]
    if status == 0 or "No space left on device" not in said:
        lost.append(f"the run ended with {status}: {said}")
    return Outcome(
        lost=lost,
        cost=f"the run ends, {told:.0f} s after: No space left on device",
        whole_after_s=whole,
        numbers={"exit_status": status, "reported_checkpoint": durable, "went_on_from": starts},
    )


def node_full(lab: Lab) -> Outcome:
    """Fill the disk of a node that trains: Ray's own files, logs and spilled objects."""
    reference, _ = undisturbed(lab)
    disk = lab.folder / "node"
    with _fresh(lab) as out, running(lab, out) as run:
        run.reach(3 * EVERY)
        trains = 1 in lab.nodes_with("RayTrainWorker")
        filler = disks.fill(disk)
        filled, before = time.monotonic(), run.step
        _must_end_well(run)
        after = [seen for seen, values in run.of("StepRecord", filled) if values["step"] > before]
        starts = [values["first_step"] for _, values in run.of("RunStart", filled)]
        filler.unlink()
        lost = _differs(out, reference)
    return Outcome(
        lost=lost,
        cost="nothing" if not starts else f"started again from step {starts[0]}",
        whole_after_s=after[0] - filled if starts else None,
        numbers={
            "node_trains": trains,
            "went_on_from": starts,
            "nodes_alive_after": len(lab.head.nodes()),
        },
    )


def storage_slow(lab: Lab) -> Outcome:
    """Give the run a disk of half a MiB a second, and look at it as a power cut would leave it."""
    reference, usual_s = undisturbed(lab)
    image, copy = lab.folder / "slow.img", lab.folder / "copy.img"
    with disks.disk(image, _DISK_BYTES) as disk:
        with disks.throttled(disk, _SLOW_BYTES_PER_S), running(lab, disk / "out") as run:
            run.reach(EVERY)
            disks.pulled_out(image, copy)
            durable = run.durable
            live = run.run_dir / f"checkpoint-{durable:08}"
            kept = lab.folder / "reported"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(live, kept)
            _must_end_well(run)
            took = run.trained_s()
        lost = _differs(disk / "out", reference)
    with disks.mounted(copy) as old:
        lost += _missing(kept, old / ".out.run" / live.name)
    copy.unlink()
    return Outcome(
        lost=lost,
        cost=f"{took:.0f} s of training in the place of {usual_s:.0f} s",
        whole_after_s=None,
        numbers={
            "bytes_per_s": _SLOW_BYTES_PER_S,
            "seconds": took,
            "seconds_undisturbed": usual_s,
            "checkpoint_when_power_was_cut": durable,
        },
    )


@contextlib.contextmanager
def _fresh(lab: Lab) -> Iterator[Path]:
    """Give a run a place where nothing is, and remove what it made."""
    out = lab.folder / "out"
    try:
        yield out
    finally:
        for left in (out, out.with_name(".out.run")):
            shutil.rmtree(left, ignore_errors=True)


def _must_end_well(run: Run) -> None:
    if run.end() != 0:
        raise RuntimeError(f"the run has failed:\n{run.log.read_text()[-3000:]}")


def _done_again(run: Run, since: float) -> int:
    """Return how many steps were done once more, after all starts since a moment."""
    total = 0
    for began, start in run.of("RunStart", since):
        before = [step["step"] for seen, step in run.of("StepRecord") if seen < began]
        total += before[-1] - start["first_step"]
    return total


def _went_back(starts: list[int], durable: int) -> list[str]:
    """Say where a run went on from before its last reported checkpoint."""
    return [f"went on from {at}, after checkpoint {durable}" for at in starts if at < durable]


def _differs(out: Path, reference: Path) -> list[str]:
    """Say which weights are other than those of the undisturbed run."""
    names = [path.name for path in reference.glob("*.safetensors")]
    same, *_ = filecmp.cmpfiles(out, reference, names, shallow=False)
    return [f"{name} differs from the undisturbed run" for name in names if name not in same]


def _missing(kept: Path, old: Path) -> list[str]:
    """Say which files of a checkpoint were not on the disk when it was reported."""
    names = [path.name for path in kept.iterdir()]
    same, *_ = filecmp.cmpfiles(kept, old, names, shallow=False)
    return [f"{name} was not on the disk yet" for name in names if name not in same]
