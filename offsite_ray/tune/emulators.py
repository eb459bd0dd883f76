# SPDX-License-Identifier: Apache-2.0
"""Emulators, each made once for all jobs of a sweep that train against it.

It lies in a folder of its own, by its compression and distillation, and by its seed where anything
is drawn. One job makes it at a time, and holds a lock meanwhile that goes with its process: where
it is killed, the next goes on from its last checkpoint. A distillation that was stopped early is
stopped for all of them.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.bundle import alone, read_manifest
from offsite_ray.config import CompressConfig, DistillConfig
from offsite_ray.distillation import distill, fill_here
from offsite_ray.emulator import compress
from offsite_ray.errors import StorageError
from offsite_ray.results import EvalRecord, to_plain
from offsite_ray.training import run_here
from offsite_ray.tune.folders import Folders, remove
from offsite_ray.tune.notes import STAGES, Notes
from offsite_ray.tune.plan import needs_text
from offsite_ray.tune.teacher import cached_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offsite_ray.results import Record as TrainingRecord
    from offsite_ray.results import TrainingHistory
    from offsite_ray.tune.bench import Bench

BUNDLE, COMPRESSED = "bundle", "compressed"
"""In the folder of an emulator: what is handed out, and what it is distilled from meanwhile."""

_LOCK = ".lock"

_COURSE, _PEAK = "distillation", "distill_peak_memory_bytes"
"""What is found of a distillation."""

_KEPT_HISTORY = 60
"""Evaluations of a training that a record keeps, at most."""


class StopTrial(Exception):
    """A distillation that is behind; raised through it, to end its job."""


def make_emulator(bench: Bench) -> Path:
    """Return the bundle that a job trains against; made if it is not there.

    Raises:
        OffsiteError: It cannot be made.
        StopTrial: Its distillation was stopped early, for this job or for another.
    """
    place = _place(bench)
    bundle = place / BUNDLE
    # Also where it is there: who made it may still be writing down what that took.
    with alone(place / _LOCK):
        if not bundle.exists():
            _make(bench, place)
        made = Notes(file=place / STAGES)
    made.found |= facts(bundle)
    bench.notes.learn(made)
    return bundle


def is_made(bench: Bench) -> bool:
    """Return whether the bundle that a job trains against is there."""
    return (_place(bench) / BUNDLE).exists()


def discard(folders: Folders, emulator: str) -> None:
    """Remove what was made of an emulator, unless a job is making it."""
    place = folders.emulator(emulator)
    left = (place / name for name in (BUNDLE, f".{BUNDLE}.run", COMPRESSED))
    if not any(path.exists() for path in left):
        return
    with contextlib.suppress(StorageError), alone(place / _LOCK, busy="a job makes it"):
        remove(place / BUNDLE, place / COMPRESSED)
        (place / STAGES).unlink(missing_ok=True)


def discard_stopped(folders: Folders) -> None:
    """Remove what is left of distillations that were stopped, by processes that were killed."""
    for file in folders.stopped.glob("*.json"):
        discard(folders, file.stem)


def _place(bench: Bench) -> Path:
    emulator = bench.job.emulator
    assert emulator is not None  # no other role trains against one
    return Folders(Path(bench.shared.root)).emulator(emulator)


def _make(bench: Bench, place: Path) -> None:
    """Compress, and distil where the job does, in a folder whose lock is held."""
    folders = Folders(Path(bench.shared.root))
    if (folders.stopped / f"{place.name}.json").exists():
        raise StopTrial
    for left in place.glob(".*.tmp-*"):  # by a job that was killed
        shutil.rmtree(left, ignore_errors=True)
    notes = Notes(file=place / STAGES)
    if "distill" not in bench.job.settings:
        compressed(bench, place / BUNDLE, notes)
        return
    compressed(bench, place / COMPRESSED, notes)
    _distilled(bench, place / COMPRESSED, place / BUNDLE, notes)
    remove(place / COMPRESSED)


def compressed(bench: Bench, out: Path, notes: Notes) -> Path:
    """Compress as a job does, unless that is done; return the bundle."""
    if not out.exists():
        fields: dict[str, Any] = dict(bench.job.settings["compress"])
        if bench.shared.public is not None and wants_text(fields):
            fields["calibration"] = (bench.shared.public,)
        result = compress(
            CompressConfig(
                **fields,
                model=bench.shared.model,
                blocks=bench.shared.blocks,
                out=str(out),
                seed=bench.job.compress_seed,
            )
        )
        notes.note("compress", result.seconds)
    notes.found |= facts(out)
    return out


def wants_text(fields: Mapping[str, Any]) -> bool:
    """Return whether compress, with some fields, looks at text that they do not give."""
    return not fields.get("calibration") and needs_text(fields)


def facts(bundle: Path) -> dict[str, Any]:
    """Return what a record says of a bundle."""
    manifest = read_manifest(bundle)
    return {
        "plan": manifest.plan.short,
        "adapter": list(manifest.plan.adapter),
        "emulator": list(manifest.plan.emulator),
        "num_blocks": manifest.plan.num_blocks,
        "bundle_bytes": manifest.measured.get("bundle_bytes"),
        "full_model_bytes": manifest.measured.get("full_model_bytes"),
    }


def _distilled(bench: Bench, bundle: Path, out: Path, notes: Notes) -> None:
    shared = bench.shared
    config = DistillConfig(
        **bench.common("distill"),
        model=shared.model,
        bundle=str(bundle),
        data=(str(shared.public),),
        out=str(out),
    )

    def report(record: TrainingRecord) -> None:
        if isinstance(record, EvalRecord) and record.step > 0:
            bench.tell(record.step, record.losses)

    fit, fill = engines(config.num_workers)
    if shared.teacher_cache:
        config = cached_config(config, Path(shared.root), fill)
    result = distill(config, fit, report, fill=fill)
    found = {_COURSE: course(result.history), _PEAK: result.history.peak_memory_bytes}
    notes.note("distill", result.seconds, **found)


def engines(num_workers: int) -> tuple[Any, Any]:
    """Return what runs a training and what fills a teacher cache: here, or on Ray Train.

    Inside a trial of Ray Tune the workers of Ray Train are asked for beside the trial's own
    resources: the trial is their driver.
    """
    if num_workers == 0:
        return run_here, fill_here
    from offsite_ray.train import fill_on_ray, run_on_ray

    return run_on_ray, fill_on_ray


def course(history: TrainingHistory) -> list[list[Any]]:
    """Return the held-out losses of a training, ``[step, losses]``, thinned."""
    records = history.evaluations
    every = max(1, -(-len(records) // _KEPT_HISTORY))
    kept = [*records[:-1:every], *records[-1:]]
    return [[record.step, to_plain(record.losses)] for record in kept]
