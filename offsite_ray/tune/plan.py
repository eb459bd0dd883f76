# SPDX-License-Identifier: Apache-2.0
"""What a sweep runs: jobs, made of points; each is run once, however many points need it.

Beside every point stand its controls (a uniform and a tail drop of the same size, uncompressed),
the bound of its adapter blocks, full fine-tuning, and the full model as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import blake3

from offsite_ray.config import DistillConfig
from offsite_ray.errors import ConfigError
from offsite_ray.selection import selection_method, uniform
from offsite_ray.split import SplitPlan, parse_plan
from offsite_ray.tune.space import Point, Value, settings_of, without_defaults

Role = Literal["full", "fine_tuned", "bound", "emulator"]
Settings = Mapping[str, Mapping[str, Value]]
"""Verb to field to value."""

_ORDER = ("full", "fine_tuned", "bound", "emulator")
_DIGITS = 12
_OF_A_METHOD = ("rank", "lora_alpha")
"""Fields of finetune that full fine-tuning has no use for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run: something that is trained and measured, with a seed."""

    role: Role
    """``full``: the full model as it is; ``fine_tuned``: all of it trained; ``bound``: adapter
    blocks trained inside it; ``emulator``: against an emulator, then plugged in."""
    settings: Settings
    seed: int
    control: str | None = None
    """``uniform`` or ``tail`` where the job is that control of some point."""

    @property
    def point(self) -> str:
        """What tells the settings from others, whatever the seed."""
        return _digest([self.role, _plain(self.settings)])

    @property
    def id(self) -> str:
        """Name of the job: the same settings and seed have the same, in any sweep."""
        return f"{self.role}-{self.point}-seed{self.seed}"

    @property
    def emulator(self) -> str | None:
        """Name of the emulator that it trains against; jobs that only differ otherwise share it."""
        if self.role != "emulator":
            return None
        made_by = {n: s for n, s in self.settings.items() if n in ("compress", "distill")}
        seed = self.seed if "distill" in made_by else self.compress_seed
        return f"{_digest(_plain(made_by))}-seed{seed}"

    @property
    def compress_seed(self) -> int:
        """Seed of its compression; 0, for all seeds alike, where nothing is drawn by it."""
        return self.seed if needs_text(self.settings["compress"]) else 0

    def to_plain(self) -> dict[str, Any]:
        """Return what :meth:`from_plain` takes; JSON holds it."""
        return {
            "role": self.role,
            "settings": _plain(self.settings),
            "seed": self.seed,
            "control": self.control,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Job:
        """Return a job of what :meth:`to_plain` gave."""
        settings = {
            stage: {f: tuple(v) if isinstance(v, list) else v for f, v in fields.items()}
            for stage, fields in plain["settings"].items()
        }
        return cls(**{**plain, "settings": settings})


@dataclass(frozen=True, kw_only=True, slots=True)
class Planner:
    """Makes jobs of points, for one model.

    A point that drops, compresses and distils nothing is no emulator. It is its own bound, and is
    not run beside it.
    """

    num_blocks: int
    """Blocks of the full model."""
    seeds: Sequence[int]
    baseline: Mapping[str, Value]
    """Fields of finetune that bound and full fine-tuning use instead of the point's."""

    def jobs(self, points: Iterable[Point]) -> list[Job]:
        """Return the jobs of points, each once: yardsticks first, then by seed.

        So a sweep that is stopped early knows every point by its first seeds.

        Raises:
            PlanError: The model cannot follow a plan.
            ConfigError: A value is not one that its verb takes.
        """
        found: dict[str, Job] = {}
        for point in points:
            for job in self._of_point(point):
                known = found.setdefault(job.id, job)
                if known.control is None and job.control is not None:
                    found[job.id] = job
        return sorted(found.values(), key=lambda job: (_ORDER.index(job.role), job.seed))

    def _of_point(self, point: Point) -> list[Job]:
        settings = self._settings(point)
        check_settings(settings)
        plan = self.resolved(settings["compress"])
        jobs = []
        for seed in self.seeds:
            jobs += self.yardsticks(settings, seed)
            if not self._is_its_bound(settings):
                jobs.append(Job(role="emulator", settings=settings, seed=seed))
            for name, drop in controls(plan).items():
                control = {**settings, "compress": drop}
                jobs.append(Job(role="emulator", settings=control, seed=seed, control=name))
        return jobs

    def yardsticks(self, settings: Settings, seed: int) -> list[Job]:
        """Return what an emulator is compared with: full model, full fine-tuning, bound."""
        finetune = {**settings["finetune"], **self.baseline}
        whole = {f: v for f, v in finetune.items() if f not in _OF_A_METHOD} | {"method": "full"}
        plan = keeps_all(self.resolved(settings["compress"]))
        return [
            Job(role="full", settings={}, seed=self.seeds[0]),
            Job(role="fine_tuned", settings={"finetune": whole}, seed=seed),
            Job(
                role="bound",
                settings={"compress": {"plan": plan}, "finetune": finetune},
                seed=seed,
            ),
        ]

    def not_run(self, points: Iterable[Point]) -> list[Job]:
        """Return the jobs of points that are not run: nothing tells them from their bounds."""
        found = {}
        for settings in map(self._settings, points):
            if self._is_its_bound(settings):
                for seed in self.seeds:
                    job = Job(role="emulator", settings=settings, seed=seed)
                    found[job.id] = job
        return list(found.values())

    def _is_its_bound(self, settings: Settings) -> bool:
        """Return whether a point is trained as its bound is, on the same blocks."""
        finetune = settings["finetune"]
        if "distill" in settings or "compress" in settings["compress"]:
            return False
        if without_defaults("finetune", {**finetune, **self.baseline}) != finetune:
            return False
        return self.resolved(settings["compress"]).keeps_every_block

    def own(self, point: Point, seed: int) -> Job:
        """Return the job of a point itself, without its controls."""
        return Job(role="emulator", settings=self._settings(point), seed=seed)

    def _settings(self, point: Point) -> Settings:
        """Return the settings of a point; where it is one of its own controls, spelled as that is.

        Otherwise ``both=4 keep=8`` and its control ``2-8-2``, one emulator, would be trained twice.
        """
        settings = settings_of(point)
        compress = settings["compress"]
        name = str(compress.get("select", "uniform"))
        if set(compress) <= {"plan", "select"} and "emulator=" not in str(compress["plan"]):
            found = controls(self.resolved(compress))
            settings["compress"] = found.get(name, compress)
        return settings

    def resolved(self, compress: Mapping[str, Value]) -> SplitPlan:
        """Return the split plan of a point; which blocks are kept is right for a uniform drop."""
        return parse_plan(str(compress["plan"]), self.num_blocks, uniform)


def controls(plan: SplitPlan) -> dict[str, dict[str, Value]]:
    """Return the fields of compress of the controls of a plan; none where nothing is dropped."""
    if plan.keeps_every_block or not plan.emulator:
        return {}
    found: dict[str, dict[str, Value]] = {}
    for name in ("uniform", "tail"):
        # Where the adapter blocks are a bottom and a top run, the short form says the same for all.
        if len(plan.segments) == 1:
            fields: dict[str, Value] = {"plan": plan.short, "select": name}
        else:
            kept = selection_method(name).choose(plan.middle, len(plan.emulator), None)
            fields = {"plan": replace(plan, emulator=tuple(kept)).spelled_out}
        found[name] = without_defaults("compress", fields)
    return found


def keeps_all(plan: SplitPlan) -> str:
    """Return the text of the plan of the bound: the same adapter blocks, nothing dropped."""
    return replace(plan, emulator=plan.middle).spelled_out


def check_settings(settings: Settings) -> None:
    """Make every configuration of a trial once, for its checks, and look up every name.

    Raises:
        OffsiteError: One of them cannot be.
    """
    from offsite_ray.config import CompressConfig, FinetuneConfig
    from offsite_ray.finetuning import FINETUNING_METHODS

    compress: Any = settings["compress"]
    finetune: Any = settings["finetune"]
    CompressConfig(**compress, model="-", out="-")
    needs_text(compress)  # which knows the names of the methods
    FinetuneConfig(**finetune, bundle="-", data=("-",), out="-")
    method = finetune.get("method", "full")
    if method not in FINETUNING_METHODS:
        raise ConfigError(f"finetune.method={method!r} is none of {', '.join(FINETUNING_METHODS)}")
    if "distill" in settings:
        distill: Any = settings["distill"]
        DistillConfig(**distill, model="-", bundle="-", data=("-",), out="-")


def needs_text(compress: Mapping[str, Any]) -> bool:
    """Return whether compress, with some fields, draws text for the full model to work on.

    Raises:
        OffsiteError: A method is unknown.
    """
    from offsite_ray.emulator import looks_at_text

    return looks_at_text(compress.get("select", "uniform"), compress.get("compress", "none"))


def _plain(settings: Settings) -> dict[str, dict[str, Any]]:
    return {
        stage: {f: list(v) if isinstance(v, tuple) else v for f, v in sorted(fields.items())}
        for stage, fields in settings.items()
    }


def _digest(plain: Any) -> str:
    text = json.dumps(plain, sort_keys=True)
    digest: str = blake3.blake3(text.encode()).hexdigest()
    return digest[:_DIGITS]
