# SPDX-License-Identifier: Apache-2.0
"""One job: train, against an emulator or without, and measure; with the functions behind the verbs.

Knows nothing of Ray Tune. What is on disk already is used: a job that was killed goes on with the
artefact that was being made, from its last checkpoint.
"""

from __future__ import annotations

import gc
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.bundle import alone
from offsite_ray.bundle.manifest import now
from offsite_ray.config import EvaluateConfig, FinetuneConfig
from offsite_ray.evaluation import evaluate
from offsite_ray.finetuning import finetune
from offsite_ray.training.devices import give_back
from offsite_ray.tune.bench import Bench
from offsite_ray.tune.emulators import compressed, course, engines, make_emulator
from offsite_ray.tune.folders import FINISHED, Folders, Record, remove

if TYPE_CHECKING:
    from collections.abc import Callable

    from offsite_ray.tune.bench import Shared, Tell
    from offsite_ray.tune.plan import Job


def run_job(job: Job, shared: Shared, tell: Tell) -> Record:
    """Run a job to its end, write its record and return it.

    Args:
        job: What to run.
        shared: What all jobs share.
        tell: Told of each evaluation of a distillation.

    Raises:
        OffsiteError: A verb refused; what it left is used by the next attempt.
    """
    folders = Folders(Path(shared.root))
    folder = folders.of(job.id)
    # A killed driver's trial may still be at work for a moment.
    with alone(folder / ".lock"):
        if (known := folders.record(job.id)) is not None and known["status"] == FINISHED:
            return known
        start = time.perf_counter()
        for left in folder.glob(".*.tmp-*"):  # by an attempt that was killed
            shutil.rmtree(left, ignore_errors=True)
        bench = Bench(job=job, shared=shared, folder=folder, tell=tell)
        measured = _MAKERS[job.role](bench)
        record = {
            **base_record(job, FINISHED),
            "measured": measured["settings"],
            "gap_metric": measured["gap_metric"],
            "versions": measured["versions"],
            "seconds": {**bench.notes.seconds, "all": time.perf_counter() - start},
            "found": {**bench.notes.found, **shared.facts},
        }
        folders.write_record(job.id, record)
    _give_back()
    return record


def _give_back() -> None:
    """Return memory that no one needs to the system, cycles too: other trials want it."""
    gc.collect()
    give_back()


def base_record(job: Job, status: str, **more: Any) -> Record:
    """Return what every record holds: the job, what became of it, and when."""
    return {"id": job.id, "point": job.point, "job": job.to_plain(), "status": status,
            "date": now(), "error": None, **more}  # fmt: skip


def _full(bench: Bench) -> Record:
    return _evaluated(bench, "full_zero_shot")


def _fine_tuned(bench: Bench) -> Record:
    out = bench.folder / "fine-tuned"
    _finetuned(bench, out, model=bench.shared.model, blocks=bench.shared.blocks)
    measured = _evaluated(bench, "full_fine_tuned", finetuned=str(out))
    remove(out)
    return measured


def _bound(bench: Bench) -> Record:
    bundle, adapter = bench.folder / "keep-all", bench.folder / "adapter"
    compressed(bench, bundle, bench.notes)
    _finetuned(bench, adapter, bundle=str(bundle))
    measured = _evaluated(bench, "bound", bound=str(adapter))
    remove(bundle, adapter)
    return measured


def _emulator(bench: Bench) -> Record:
    adapter = bench.folder / "adapter"
    bundle = make_emulator(bench)
    _finetuned(bench, adapter, bundle=str(bundle))
    settings = ("plug_in", "emulator_zero_shot", "emulator_fine_tuned")
    measured = _evaluated(bench, *settings, bundle=str(bundle), adapter=str(adapter))
    remove(adapter)
    return measured


_MAKERS: dict[str, Callable[[Bench], Record]] = {
    "full": _full,
    "fine_tuned": _fine_tuned,
    "bound": _bound,
    "emulator": _emulator,
}
"""Role of a job to what runs it."""


def _finetuned(bench: Bench, out: Path, **what: Any) -> None:
    if out.exists():
        return
    config = FinetuneConfig(
        **bench.common("finetune"),
        **what,
        data=(bench.shared.private,),
        out=str(out),
    )
    fit, _ = engines(config.num_workers)
    result = finetune(config, fit, lambda _: None)
    _give_back()
    bench.notes.note(
        "finetune",
        result.seconds,
        finetuning=course(result.history),
        num_trained=result.num_trained,
        finetune_peak_memory_bytes=result.history.peak_memory_bytes,
    )


def _evaluated(bench: Bench, *settings: str, **artefacts: str) -> Record:
    shared, start = bench.shared, time.perf_counter()
    config = EvaluateConfig(
        model=shared.model,
        blocks=shared.blocks,
        text=shared.text,
        tasks=shared.tasks,
        task_data=shared.task_data,
        task_path=shared.task_path,
        task_limit=shared.task_limit,
        seq_len=shared.seq_len,
        batch_size=shared.batch_size,
        dtype=shared.dtype,
        **artefacts,  # type: ignore[arg-type]
    )
    plain = evaluate(config, settings=settings).to_json()
    bench.notes.seconds["evaluate"] = time.perf_counter() - start
    return {**plain, "settings": {name: plain["settings"][name] for name in settings}}
