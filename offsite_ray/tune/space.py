# SPDX-License-Identifier: Apache-2.0
"""The search space of a sweep: from the mapping of its YAML to points, all plain values.

A knob is a field of the configuration of a verb, ``compress.plan`` or ``distill.hidden_weight``,
so every registry row and every setting can be swept as soon as its verb takes it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union

from offsite_ray.config import CompressConfig, DistillConfig, FinetuneConfig
from offsite_ray.errors import ConfigError, unknown_name

STAGES: dict[str, type] = {
    "compress": CompressConfig,
    "distill": DistillConfig,
    "finetune": FinetuneConfig,
}
"""Verb whose fields are knobs to its configuration."""

NUM_WORKERS = 0
"""Ray Train workers of a training where the space does not say; the trial trains by itself."""

ANY_OF = "any_of"
"""Key of a space below which alternatives stand: each is a space of its own, over the rest."""

_GIVEN = frozenset(
    {
        "model", "bundle", "data", "out", "seed", "seq_len", "blocks", "resume", "log_dir",
        "report_to", "dry_run", "dtype", "result", "teacher_cache",
    }
)  # fmt: skip
"""Fields that the sweep sets itself, or that make trials incomparable."""

_STEPS = "distill.max_steps"

_MOST_POINTS = 100_000
"""Points of a grid, above which it is a mistake."""

Value = str | int | float | bool | None | tuple[str, ...]
Point = dict[str, Value]
"""Knob to its value, in the order of the space."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Numbers between two bounds, both included."""

    low: float
    high: float
    log: bool = False
    """Whether all orders of magnitude are as likely, rather than all numbers."""
    whole: bool = False
    """Whether only whole numbers count."""

    def draw(self, chance: random.Random) -> float | int:
        """Return a number by chance."""
        if self.log:
            drawn = math.exp(chance.uniform(math.log(self.low), math.log(self.high)))
        else:
            drawn = chance.uniform(self.low, self.high)
        return round(drawn) if self.whole else drawn


Knob = tuple[Value, ...] | Range
Variant = dict[str, Knob]
"""Knob to its values: a box in the space."""


def varying(variants: Sequence[Variant]) -> set[str]:
    """Return the knobs that have more than one value in a space."""
    names = {name for variant in variants for name in variant}
    return {
        name
        for name in names
        if any(isinstance(v.get(name), Range) or len(v.get(name, ())) > 1 for v in variants)  # type: ignore[arg-type]
        or len({v.get(name) for v in variants}) > 1
    }


def parse_space(plain: Mapping[str, Any], over: Sequence[Mapping[str, Any]] = ()) -> list[Variant]:
    """Return the variants of a space; each is a box of knobs.

    Args:
        plain: Verb to field to a value, a list of values, or ``{low, high, log}``. Below ``any_of``
            a list of such mappings, each of which makes a variant with the rest.
        over: Variants to start from (those of a preset), which ``plain`` wins over.

    Raises:
        ConfigError: A verb, a field or a value is not one that a trial can have.
    """
    rest = {key: value for key, value in plain.items() if key != ANY_OF}
    listed = plain.get(ANY_OF, [{}])
    if not isinstance(listed, list) or not listed or not all(map(_is_mapping, listed)):
        raise ConfigError(f"{ANY_OF} must be a list of spaces, each with keys for verbs")
    variants = []
    for start in over or [{}]:
        for alternative in listed:
            variant: Variant = {}
            for part in (start, rest, alternative):
                variant |= _knobs(part)
            if start.get("distill", {}).get("max_steps") == 0:
                # A preset's emulator that is not distilled, whatever is said of the others.
                variant[_STEPS] = (0,)
            if "compress.plan" not in variant:
                raise ConfigError("the space has no compress.plan; give one, e.g. plan: [2-8-2]")
            variants.append(variant)
    return variants


def may_distil(variant: Variant) -> bool:
    """Return whether some point of a variant distils."""
    return any(name.startswith("distill.") for name in variant) and variant.get(_STEPS) != (0,)


def grid(variants: Sequence[Variant]) -> list[Point]:
    """Return every combination of every variant, each once.

    Raises:
        ConfigError: A knob is a range, or the combinations are too many to be meant.
    """
    points: list[Point] = []
    for variant in variants:
        for name, knob in variant.items():
            if isinstance(knob, Range):
                raise ConfigError(
                    f"{name} is a range, of which a grid has no points; list values, or choose "
                    "search: random or optuna"
                )
        choices = [knob for knob in variant.values() if isinstance(knob, tuple)]
        if (size := math.prod(map(len, choices))) > _MOST_POINTS:
            raise ConfigError(
                f"the grid has {size} points, more than {_MOST_POINTS}; choose search: random"
            )
        points += [
            dict(zip(variant, values, strict=True)) for values in itertools.product(*choices)
        ]
    return unique(points)


def draw(variants: Sequence[Variant], num_points: int, seed: int) -> list[Point]:
    """Return points by chance, each once; fewer where the space has no more."""
    chance = random.Random(seed)
    points: list[Point] = []
    for _ in range(20 * num_points):
        variant = chance.choice(list(variants))
        points.append(
            {
                name: knob.draw(chance) if isinstance(knob, Range) else chance.choice(knob)
                for name, knob in variant.items()
            }
        )
        points = unique(points)
        if len(points) == num_points:
            break
    return points


def every_value(variants: Sequence[Variant]) -> list[Point]:
    """Return points that have between them every value of every knob, and both ends of ranges."""
    points: list[Point] = []
    for variant in variants:
        values = {name: _ends(knob) for name, knob in variant.items()}
        first = {name: found[0] for name, found in values.items()}
        points += [first | {name: value} for name, found in values.items() for value in found]
    return unique(points)


def _ends(knob: Knob) -> tuple[Value, ...]:
    if not isinstance(knob, Range):
        return knob
    return tuple(round(end) if knob.whole else end for end in (knob.low, knob.high))


def unique(points: Sequence[Point]) -> list[Point]:
    """Return the points in their order, each once."""
    found: dict[tuple[tuple[str, Value], ...], Point] = {}
    for point in points:
        found.setdefault(tuple(sorted(point.items())), point)
    return list(found.values())


def settings_of(point: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Return a point by verb, without defaults; without distill where it is not asked for."""
    settings: dict[str, dict[str, Value]] = {stage: {} for stage in STAGES}
    for name, value in point.items():
        stage, _, field = name.partition(".")
        settings[stage][field] = value
    if not settings["distill"] or settings["distill"].get("max_steps") == 0:
        del settings["distill"]
    return {stage: without_defaults(stage, fields) for stage, fields in settings.items()}


def without_defaults(stage: str, fields: Mapping[str, Value]) -> dict[str, Value]:
    """Return the fields of a verb whose value is not its default, so that equal settings are."""
    defaults = {field.name: field.default for field in dataclasses.fields(STAGES[stage])}
    defaults["num_workers"] = NUM_WORKERS
    return {name: value for name, value in fields.items() if value != defaults[name]}


def stage_fields(stage: str, plain: Mapping[str, Any]) -> dict[str, Value]:
    """Return single values of a verb's fields, checked; raise :class:`ConfigError`."""
    knobs = _knobs({stage: plain})
    several = [name for name, knob in knobs.items() if isinstance(knob, Range) or len(knob) != 1]
    if several:
        raise ConfigError(f"{several[0]} must be one value here")
    return {
        name.partition(".")[2]: knob[0] for name, knob in knobs.items() if isinstance(knob, tuple)
    }


def _knobs(plain: Mapping[str, Any]) -> Variant:
    knobs: Variant = {}
    for stage, fields in plain.items():
        if stage not in STAGES:
            raise ConfigError(unknown_name("part of the space", str(stage), (*STAGES, ANY_OF)))
        if not _is_mapping(fields):
            raise ConfigError(f"{stage} in the space must have fields with values, not {fields!r}")
        for field, values in fields.items():
            knobs[f"{stage}.{field}"] = _knob(stage, str(field), values)
    return knobs


def _knob(stage: str, field: str, values: Any) -> Knob:
    hints = typing.get_type_hints(STAGES[stage])
    known = [f.name for f in dataclasses.fields(STAGES[stage]) if f.name not in _GIVEN]
    if field not in known:
        own = " (the sweep sets it)" if field in _GIVEN and field in hints else ""
        raise ConfigError(unknown_name(f"knob of {stage}", field, known) + own)
    hint, name = hints[field], f"{stage}.{field}"
    if _is_mapping(values):
        return _range(name, hint, values)
    listed = values if isinstance(values, list) else [values]
    if not listed:
        raise ConfigError(f"{name} has no value; list one")
    found = tuple(_value(name, hint, value) for value in listed)
    return tuple(dict.fromkeys(found))


def _range(name: str, hint: Any, plain: Mapping[str, Any]) -> Range:
    if odd := sorted(set(map(str, plain)) - {"low", "high", "log"}):
        raise ConfigError(unknown_name(f"part of the range {name}", odd[0], ("low", "high", "log")))
    kinds = _kinds(hint)
    if not {int, float} & set(kinds) or not {"low", "high"} <= set(plain):
        raise ConfigError(f"{name}: a range has low and high, and is of a number")
    low, high = (float(_value(name, float, plain[key])) for key in ("low", "high"))  # type: ignore[arg-type]
    log = plain.get("log", False)
    if low > high or (log and low <= 0) or not isinstance(log, bool):
        raise ConfigError(f"{name}: low={low:g} and high={high:g} make no range")
    return Range(low=low, high=high, log=log, whole=float not in kinds)


def _value(name: str, hint: Any, value: Any) -> Value:
    """Return a value of a field's type; numbers may be texts, as YAML reads ``1e-4``."""
    for kind in _kinds(hint):
        if kind is NoneType and value is None:
            return None
        if kind is bool and isinstance(value, bool):
            return value
        if kind is tuple and isinstance(value, str):
            return (value,)
        if kind is str and isinstance(value, str) and _allowed(hint, value):
            return value
        if kind in (int, float) and isinstance(value, int | float | str):
            number = _number(kind, value)
            if number is not None:
                return number
    raise ConfigError(f"{name}={value!r} is not a value that it can have")


def _number(kind: type, value: Any) -> int | float | None:
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        return None
    try:
        number: int | float = kind(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _kinds(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (Union, UnionType):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    if typing.get_origin(hint) is Literal:
        return [str]
    return [typing.get_origin(hint) or hint]


def _allowed(hint: Any, value: str) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    return True


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)
