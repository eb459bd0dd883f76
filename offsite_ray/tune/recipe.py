# SPDX-License-Identifier: Apache-2.0
"""The winner of a sweep: its bundle, and the recipe by which the verbs make it again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.bundle import alone, atomic_directory
from offsite_ray.data import is_prepared
from offsite_ray.tune.attempts import ARTEFACTS
from offsite_ray.tune.bench import Bench
from offsite_ray.tune.emulators import BUNDLE, discard, is_made, make_emulator, wants_text
from offsite_ray.tune.folders import FAILED, Folders, remove
from offsite_ray.tune.front import front
from offsite_ray.tune.plan import Job
from offsite_ray.tune.space import NUM_WORKERS
from offsite_ray.tune.table import rows_of, summaries
from offsite_ray.uris import without_secrets

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from offsite_ray.config import SweepConfig
    from offsite_ray.tune.attempts import Watch
    from offsite_ray.tune.bench import Shared
    from offsite_ray.tune.folders import Record
    from offsite_ray.tune.plan import Planner
    from offsite_ray.tune.table import Summary

RECIPE = "recipe.yaml"

_HEAD = """\
# The emulator that won a sweep: {label}, seed {seed}.
#
# To make it again, in an empty folder, to which the paths below are relative:
# python jobs/distill.py --root . --config THIS_FILE
# or, one after the other:
{verbs}
"""


def write_winner(
    folders: Folders, winner: Summary, config: SweepConfig, shared: Shared, *, may_make: bool
) -> Path | None:
    """Write the winner's bundle and recipe, in place of those of an earlier one.

    Args:
        folders: Where.
        winner: Of which the first seed is taken.
        config: What its recipe is made of.
        shared: What its bundle is made of.
        may_make: Whether a bundle that was removed, because it was behind at that time, may be made
            again: that takes as long as it did.

    Returns:
        The directory; None where the bundle is not there, and an earlier winner is left as it is.
    """
    job = Job.from_plain(_record(folders, winner)["job"])
    bench = Bench(job=job, shared=shared, folder=folders.of(job.id), tell=_unheard)
    # A trial of a driver that was killed may still be at work.
    with alone(folders.of(job.id) / ".lock"):
        if not (may_make or is_made(bench)):
            return None
        # Made again whatever was decided of its distillation since it was measured.
        (folders.stopped / f"{job.emulator}.json").unlink(missing_ok=True)
        bundle = make_emulator(bench)
        shutil.rmtree(folders.winner, ignore_errors=True)
        with atomic_directory(folders.winner) as tmp:
            shutil.copytree(bundle, tmp / BUNDLE)
            (tmp / RECIPE).write_text(recipe_text(job, config, shared), encoding="utf-8")
    return folders.winner


def recipe_text(job: Job, config: SweepConfig, shared: Shared) -> str:
    """Return the YAML by which ``jobs/distill.py`` and the verbs make a job's emulator."""
    import yaml

    recipe = without_secrets(recipe_of_job(job, config, shared))
    verbs = "\n".join(f"# offsite-ray {verb} --config THIS_FILE" for verb in recipe)
    head = _HEAD.format(label=label_of(job), seed=job.seed, verbs=verbs)

    class Plain(yaml.SafeDumper):
        """Writes a value that stands in two places out in both."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    body = yaml.dump(recipe, Dumper=Plain, sort_keys=False, width=100)
    return f"{head}\n{body}"


def recipe_of_job(job: Job, config: SweepConfig, shared: Shared) -> dict[str, Any]:
    """Return the sections of a recipe."""
    model = _absolute(shared.model)
    compress: dict[str, Any] = dict(job.settings["compress"])
    finetune = dict(job.settings["finetune"])
    public = [_absolute(source) for source in config.public]
    if wants_text(compress):
        compress |= {"calibration": public, "calibration_seq_len": shared.seq_len}
    bundle, distil = "bundle", {}
    if (distill := job.settings.get("distill")) is not None:
        bundle, distil = "emulator", _sections_to_distil(dict(distill), public, job, shared)
    return {
        "compress": {"model": model, **_given(shared), **compress, "out": "bundle",
                     "seed": job.compress_seed},
        **distil,
        "finetune": {"bundle": bundle,
                     "data": [_absolute(source) for source in config.private], "out": "adapter",
                     "seq_len": shared.seq_len, "dtype": shared.dtype, **finetune, "seed": job.seed,
                     "resume": True},
    }  # fmt: skip


def _sections_to_distil(
    distill: dict[str, Any], public: list[str], job: Job, shared: Shared
) -> dict[str, Any]:
    """Return how data are prepared, unless they are, and how the bundle is distilled on them."""
    model, prepared = _absolute(shared.model), [path for path in public if is_prepared(path)]
    prepare = {"tokenizer": model, "text": public, "block_size": shared.seq_len, "out": "public"}
    return {
        **({} if prepared else {"prepare": prepare}),
        "distill": {"model": model, "bundle": "bundle", "data": prepared or ["public"],
                    "out": "emulator", "num_workers": NUM_WORKERS, "dtype": shared.dtype,
                    **distill, "seed": job.seed, "resume": True},
    }  # fmt: skip


def prune_bundles(
    folders: Folders, records: Iterable[Record], keep: Sequence[Summary], wanted: Iterable[Job]
) -> None:
    """Remove the bundles of all points but some; they can be made again by their settings.

    Args:
        folders: Where they are.
        records: Of the jobs that have ended.
        keep: Points whose bundles stay.
        wanted: Jobs that are yet to end, whose emulators stay.
    """
    kept = {point.point for point in keep}
    needed, behind = {job.emulator for job in wanted}, set()
    for record in records:
        emulator = Job.from_plain(record["job"]).emulator
        if record["point"] in kept:
            needed.add(emulator)
            continue
        behind.add(emulator)
        remove(*(folders.of(record["id"]) / name for name in ARTEFACTS))
    for emulator in behind - needed:
        if emulator is not None:
            discard(folders, emulator)


class PrunedToo:
    """Passes on what happens in a sweep, and removes at once the bundles that are behind.

    The bundles of large models would fill the disk before the last job has ended.
    """

    def __init__(
        self,
        folders: Folders,
        planner: Planner,
        objectives: Sequence[str],
        wanted: Iterable[Job],
        other: Watch,
    ) -> None:
        """Know what has ended already, and tell another watch.

        Args:
            folders: Where bundles are.
            planner: Of the sweep.
            objectives: By which a point is behind.
            wanted: Jobs that are known to be run, besides those of which :meth:`started` tells.
            other: Watch to tell.
        """
        self._folders, self._planner, self._objectives = folders, planner, objectives
        self._other = other
        self._wanted = {job.id: job for job in wanted}
        self._records = {
            record["id"]: record for record in folders.records() if record["status"] != FAILED
        }

    def started(self, job: Job) -> None:
        """Leave alone what is at work, whatever became of it before."""
        self._records.pop(job.id, None)
        self._wanted[job.id] = job
        self._other.started(job)

    def evaluated(self, job: Job, step: int, losses: Mapping[str, float]) -> None:
        """Pass it on."""
        self._other.evaluated(job, step, losses)

    def ended(self, record: Record) -> None:
        """Remove what is no longer on the front, or never came to be."""
        self._records[record["id"]] = record
        self._wanted.pop(record["id"], None)
        records = list(self._records.values())
        points = summaries(rows_of(records, self._planner))
        best = front(points, self._objectives)
        prune_bundles(self._folders, records, best, self._wanted.values())
        self._other.ended(record)


def label_of(job: Job) -> str:
    """Return a job's settings in a line."""
    stages = (
        f"{stage} {', '.join(f'{name}={value}' for name, value in fields.items())}"
        for stage, fields in job.settings.items()
        if fields
    )
    return "; ".join(stages) or job.role


def _given(shared: Shared) -> dict[str, Any]:
    return {"blocks": shared.blocks} if shared.blocks is not None else {}


def _record(folders: Folders, winner: Summary) -> dict[str, Any]:
    record = folders.record(winner.row["id"])
    if record is None:
        raise FileNotFoundError(folders.record_file(winner.row["id"]))
    return record


def _absolute(source: str) -> str:
    """Return the path of something that is on this machine; a name or a URI as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def _unheard(*_: Any) -> None:
    """Take no notice of an evaluation."""
