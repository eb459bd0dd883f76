# SPDX-License-Identifier: Apache-2.0
"""Where jobs come from: a list that is known from the start, or Optuna, which learns from them."""

from __future__ import annotations

import json
import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from offsite_ray.bundle import write_json
from offsite_ray.errors import ConfigError, OffsiteError
from offsite_ray.tune.folders import FINISHED, Record
from offsite_ray.tune.space import Knob, Point, Range, Value, Variant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from offsite_ray.tune.plan import Job, Planner

_LOG = logging.getLogger(__name__)

VARIANT = "variant"
"""Parameter of Optuna's that says which box of the space the others are of."""


class Source(Protocol):
    """Gives jobs one after the other."""

    def next(self) -> Job | None:
        """Return the next job; None where there is none, for now or for good."""
        ...

    def told(self, record: Record) -> None:
        """Take what became of a job."""
        ...

    @property
    def exhausted(self) -> bool:
        """Whether there is no further job, whatever becomes of those that are out."""
        ...

    @property
    def done(self) -> bool:
        """Whether there is no further job, and all that were given out came to an end."""
        ...


class Listed:
    """Jobs that are known from the start.

    In their order; but one whose emulator another job is making is put off while there are others,
    for it would only wait.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        """Take the jobs that are yet to be run."""
        self._jobs = [(job.emulator, job) for job in jobs]
        self._out: dict[str, str | None] = {}
        self._made: set[str | None] = {None}

    def next(self) -> Job | None:
        """Return the next job."""
        if not self._jobs:
            return None
        making = set(self._out.values()) - self._made
        free = (i for i, (emulator, _) in enumerate(self._jobs) if emulator not in making)
        emulator, job = self._jobs.pop(next(free, 0))
        self._out[job.id] = emulator
        return job

    def told(self, record: Record) -> None:
        """Take note that a job is no longer out."""
        emulator = self._out.pop(record["id"], None)
        if record["status"] == FINISHED:
            self._made.add(emulator)

    @property
    def exhausted(self) -> bool:
        """Whether all were given out."""
        return not self._jobs

    @property
    def done(self) -> bool:
        """Whether all were given out and came to an end."""
        return self.exhausted and not self._out


@dataclass(kw_only=True, slots=True)
class _Asked:
    """A point that Optuna asked for."""

    trial: Any
    point: Point
    jobs: list[Job]
    """Its own jobs, one a seed; without its controls. None where it is its own bound."""
    again: bool
    """Whether all of these were given out for another point."""


class Suggested:
    """Jobs of points that Optuna suggests."""

    def __init__(
        self,
        variants: Sequence[Variant],
        planner: Planner,
        num_points: int,
        seed: int,
        known: Mapping[str, Record],
        score: Callable[[Sequence[Record]], list[float] | None],
        directions: Sequence[str],
        memory: Path,
    ) -> None:
        """Start a study.

        Args:
            variants: The space.
            planner: Makes jobs of points.
            num_points: Points to ask for.
            seed: Of the sampler.
            known: Records by job id, of a sweep that goes on; jobs in it are not given out.
            score: Objectives of the records of a point; None where they cannot be known.
            directions: ``minimize`` or ``maximize``, for each objective.
            memory: File of the points that were asked for; a sweep that goes on asks for the same
                again, as far as the space still has them.

        Raises:
            ConfigError: Optuna is not installed.
        """
        self._optuna = _optuna()
        self._variants, self._planner, self._score = list(variants), planner, score
        self._left = num_points
        self._records = dict(known)
        self._given: set[str] = set(known)
        self._queue: deque[Job] = deque()
        self._open: list[_Asked] = []
        self._memory, self._asked = memory, list[Point]()
        remembered = json.loads(memory.read_text("utf-8")) if memory.is_file() else []
        again = [p for point in remembered if (p := parameters_of(point, variants)) is not None]
        self._num_remembered = len(again)
        # What is remembered takes no draw, so the same seed would draw the same points again.
        sampler = self._optuna.samplers.TPESampler(seed=seed + len(remembered))
        self._study = self._optuna.create_study(directions=list(directions), sampler=sampler)
        for parameters in again:
            self._study.enqueue_trial(parameters)

    def next(self) -> Job | None:
        """Return a job of the next point; None while what is at work is to be waited for.

        That is so where Optuna asked for a point that is at work already: it would again.
        """
        while not self._queue and self._left and not any(asked.again for asked in self._open):
            self._ask()
        return self._queue.popleft() if self._queue else None

    def told(self, record: Record) -> None:
        """Tell Optuna of the points that are now done."""
        self._records[record["id"]] = record
        self._settle()

    @property
    def exhausted(self) -> bool:
        """Whether all points were asked for, and all their jobs given out."""
        return not self._queue and not self._left

    @property
    def done(self) -> bool:
        """Whether all points were asked for, and all their jobs came to an end."""
        return self.exhausted and self._given <= self._records.keys()

    def _ask(self) -> None:
        trial = self._study.ask()
        place = trial.suggest_int(VARIANT, 0, len(self._variants) - 1)
        point: Point = {
            name: _suggest(trial, f"{place}.{name}", knob)
            for name, knob in self._variants[place].items()
        }
        self._left -= 1
        try:
            jobs = self._planner.jobs([point])
        except OffsiteError as error:
            _LOG.warning("Optuna asked for a point that cannot be run: %s", error)
            jobs = []
        self._asked.append(point)
        if len(self._asked) > self._num_remembered:
            write_json(self._memory, self._asked)
        if not jobs:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            return
        ids = {self._planner.own(point, seed).id for seed in self._planner.seeds}
        own = [job for job in jobs if job.id in ids]
        self._open.append(_Asked(trial=trial, point=point, jobs=own, again=ids <= self._given))
        self._queue.extend(job for job in jobs if job.id not in self._given)
        self._given |= {job.id for job in jobs}
        self._settle()

    def _settle(self) -> None:
        for asked in list(self._open):
            records = [self._records.get(job.id) for job in asked.jobs]
            whole = [record for record in records if record is not None]
            if len(whole) < len(records):
                continue
            self._open.remove(asked)
            done = all(record["status"] == FINISHED for record in whole)
            values = self._score(whole) if done and whole else None
            if values is None:
                failed = self._optuna.trial.TrialState.FAIL
                self._study.tell(asked.trial, state=failed)
            else:
                self._study.tell(asked.trial, values)


def asked_points(memory: Path, planner: Planner) -> list[Point]:
    """Return the points that Optuna has asked for so far, as far as they can be run."""
    found = []
    for plain in json.loads(memory.read_text("utf-8")) if memory.is_file() else []:
        point: Point = {n: tuple(v) if isinstance(v, list) else v for n, v in plain.items()}
        try:
            planner.jobs([point])
        except OffsiteError:
            continue
        found.append(point)
    return found


def parameters_of(point: Mapping[str, Any], variants: Sequence[Variant]) -> dict[str, Any] | None:
    """Return the parameters by which Optuna asks for a point; None where no variant has it.

    Args:
        point: Knob to value, as JSON holds them. Places in lists would mean another value as soon
            as the lists change.
        variants: The space, as it is now.
    """
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in point.items()}
    for place, variant in enumerate(variants):
        if variant.keys() == values.keys() and all(_has(variant[n], v) for n, v in values.items()):
            choices = {name: knob for name, knob in variant.items() if not _is_single(knob)}
            return {VARIANT: place} | {
                f"{place}.{name}": values[name]
                if isinstance(knob, Range)
                else knob.index(values[name])
                for name, knob in choices.items()
            }
    return None


def _has(knob: Knob, value: Value) -> bool:
    if not isinstance(knob, Range):
        return value in knob
    whole = isinstance(value, int) or not knob.whole
    return isinstance(value, int | float) and whole and knob.low <= value <= knob.high


def _is_single(knob: Knob) -> bool:
    return not isinstance(knob, Range) and len(knob) == 1


def _suggest(trial: Any, name: str, knob: Any) -> Any:
    if not isinstance(knob, Range):
        # Optuna takes scalars only, so a place in the list stands for the value.
        places = list(range(len(knob)))
        return knob[0] if _is_single(knob) else knob[trial.suggest_categorical(name, places)]
    if knob.whole:
        return trial.suggest_int(name, round(knob.low), round(knob.high), log=knob.log)
    return trial.suggest_float(name, knob.low, knob.high, log=knob.log)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "search=optuna needs the package optuna; pip install 'offsite-ray[optuna]', or choose "
            "search: random"
        ) from error
    optuna.logging.set_verbosity(logging.ERROR)
    return optuna
