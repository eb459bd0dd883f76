# SPDX-License-Identifier: Apache-2.0
"""One job: make an emulator, train against it, measure; with the functions behind the verbs.

Knows nothing of Ray Tune. What is on disk already is used: a job that was killed goes on with the
artefact that was being made, from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.bundle import alone, read_manifest
from offsite_ray.bundle.manifest import now
from offsite_ray.config import CompressConfig, DistillConfig, EvaluateConfig, FinetuneConfig
from offsite_ray.distillation import distill, fill_here
from offsite_ray.emulator import compress, looks_at_text
from offsite_ray.evaluation import evaluate
from offsite_ray.finetuning import finetune
from offsite_ray.results import EvalRecord, to_plain
from offsite_ray.training import run_here
from offsite_ray.tune.folders import (
    FINISHED,
    Folders,
    Record,
    read_record,
    remove,
    write_json,
)
from offsite_ray.tune.space import NUM_WORKERS
from offsite_ray.tune.teacher import cached_config

if TYPE_CHECKING:
    from offsite_ray.config import ComputeDtype
    from offsite_ray.results import Record as TrainingRecord
    from offsite_ray.results import TrainingHistory
    from offsite_ray.tune.plan import Job

Tell = Callable[[int, Mapping[str, float]], None]
"""Told of a distillation: ``(steps, held-out losses by part)``; may raise, to stop the job."""

_KEPT_HISTORY = 60
"""Evaluations of a training that a record keeps, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What every job of a sweep has in common. Plain values: it is shipped to workers."""

    root: str
    """Directory of the sweep, which every node sees."""
    model: str
    private: str
    """Prepared data to fine-tune on."""
    public: str | None
    """Prepared data to distil on."""
    blocks: str | None
    text: tuple[str, ...]
    tasks: tuple[str, ...]
    task_data: tuple[str, ...]
    task_path: tuple[str, ...]
    task_limit: int | None
    seq_len: int
    batch_size: int
    dtype: ComputeDtype
    teacher_cache: bool
    """Whether distillations read the teacher's outputs, computed once for all."""
    facts: Mapping[str, Any]
    """What every record says of the data: their digests."""

    def to_plain(self) -> dict[str, Any]:
        """Return what :meth:`from_plain` takes."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Shared:
        """Return what was made plain."""
        tuples = {n: tuple(plain[n]) for n in ("text", "tasks", "task_data", "task_path")}
        return cls(**{**plain, **tuples})


@dataclass(kw_only=True, slots=True)
class Bench:
    """A job that is at work: where, and what it has cost and found so far."""

    job: Job
    shared: Shared
    folder: Path
    tell: Tell
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage to the time that it took."""
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take up what stages of an earlier attempt have found."""
        known = read_record(self._notes) or {"seconds": {}, "found": {}}
        self.seconds, self.found = known["seconds"], known["found"]

    @property
    def _notes(self) -> Path:
        return self.folder / "stages.json"

    def note(self, stage: str, seconds: float, **found: Any) -> None:
        """Keep what a stage took and found, should the job be killed after it."""
        self.seconds[stage] = seconds
        self.found |= found
        write_json(self._notes, {"seconds": self.seconds, "found": self.found})

    def common(self, stage: str) -> dict[str, Any]:
        """Return the fields of a training verb that every job of the sweep shares."""
        given: dict[str, Any] = dict(self.job.settings[stage])
        own = {"dtype": self.shared.dtype, "seed": self.job.seed, "resume": True}
        return {"num_workers": NUM_WORKERS, **given, **own}


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
            "seconds": {**bench.seconds, "all": time.perf_counter() - start},
            "found": {**bench.found, **shared.facts},
        }
        folders.write_record(job.id, record)
    _give_back()
    return record


def _give_back() -> None:
    """Return memory that is free to the system, for the next job of this process."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


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
    _compressed(bench, bundle)
    _finetuned(bench, adapter, bundle=str(bundle))
    measured = _evaluated(bench, "bound", bound=str(adapter))
    remove(bundle, adapter)
    return measured


def _emulator(bench: Bench) -> Record:
    compressed, adapter = bench.folder / "compressed", bench.folder / "adapter"
    bundle = make_emulator(bench)
    _finetuned(bench, adapter, bundle=str(bundle))
    settings = ("plug_in", "emulator_zero_shot", "emulator_fine_tuned")
    measured = _evaluated(bench, *settings, bundle=str(bundle), adapter=str(adapter))
    remove(compressed, adapter)
    return measured


_MAKERS: dict[str, Callable[[Bench], Record]] = {
    "full": _full,
    "fine_tuned": _fine_tuned,
    "bound": _bound,
    "emulator": _emulator,
}
"""Role of a job to what runs it."""


def make_emulator(bench: Bench) -> Path:
    """Compress, and distil where the job does; return the bundle that is handed out."""
    bundle = bench.folder / "bundle"
    if "distill" not in bench.job.settings:
        return _compressed(bench, bundle)
    if not bundle.exists():
        _compressed(bench, bench.folder / "compressed")
        _distilled(bench, bench.folder / "compressed", bundle)
    bench.found |= _facts(bundle)
    return bundle


def _compressed(bench: Bench, out: Path) -> Path:
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
                seed=bench.job.seed,
            )
        )
        bench.note("compress", result.seconds)
    bench.found |= _facts(out)
    return out


def wants_text(fields: Mapping[str, Any]) -> bool:
    """Return whether compress, with some fields, looks at text that they do not give."""
    if fields.get("calibration"):
        return False
    return looks_at_text(fields.get("select", "uniform"), fields.get("compress", "none"))


def _facts(bundle: Path) -> dict[str, Any]:
    manifest = read_manifest(bundle)
    return {
        "plan": manifest.plan.short,
        "adapter": list(manifest.plan.adapter),
        "emulator": list(manifest.plan.emulator),
        "num_blocks": manifest.plan.num_blocks,
        "bundle_bytes": manifest.measured.get("bundle_bytes"),
        "full_model_bytes": manifest.measured.get("full_model_bytes"),
    }


def _distilled(bench: Bench, bundle: Path, out: Path) -> None:
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
    bench.note(
        "distill",
        result.seconds,
        distillation=_course(result.history),
        distill_peak_memory_bytes=result.history.peak_memory_bytes,
    )


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
    bench.note(
        "finetune",
        result.seconds,
        finetuning=_course(result.history),
        num_trained=result.num_trained,
        finetune_peak_memory_bytes=result.history.peak_memory_bytes,
    )


def engines(num_workers: int) -> tuple[Any, Any]:
    """Return what runs a training and what fills a teacher cache: here, or on Ray Train.

    Inside a trial of Ray Tune the workers of Ray Train are asked for beside the trial's own
    resources: the trial is their driver.
    """
    if num_workers == 0:
        return run_here, fill_here
    from offsite_ray.train import fill_on_ray, run_on_ray

    return run_on_ray, fill_on_ray


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
    bench.seconds["evaluate"] = time.perf_counter() - start
    return {**plain, "settings": {name: plain["settings"][name] for name in settings}}


def _course(history: TrainingHistory) -> list[list[Any]]:
    """Return the held-out losses of a training, ``[step, losses]``, thinned."""
    records = history.evaluations
    every = max(1, -(-len(records) // _KEPT_HISTORY))
    kept = [*records[:-1:every], *records[-1:]]
    return [[record.step, to_plain(record.losses)] for record in kept]
