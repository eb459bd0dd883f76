# SPDX-License-Identifier: Apache-2.0
"""From what was written, on the command line or in YAML, to the value of a field."""

from __future__ import annotations

import math
import reprlib
from typing import TYPE_CHECKING, Any

from offsite_ray.cli.fields import COMMA_SEPARATED
from offsite_ray.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offsite_ray.cli.fields import Field

_ALLOWED: dict[type, str] = {
    str: "text (in YAML, quote what reads as something else)",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    tuple: "a text or a list of texts",
    dict: "keys with values",
}


def from_flag(field: Field, given: Any) -> Any:
    """Return the value of a field from what its flag was given.

    Args:
        field: The field.
        given: A text; several for a field that takes several; a bool for a switch.

    Raises:
        ConfigError: It is not of the field's type.
    """
    if field.kind in (int, float):
        return _number(field, given, field.flag)
    if field.kind is dict:
        return from_yaml(field, _mapping(given), field.flag)
    return from_yaml(field, given, field.flag)


def from_yaml(field: Field, value: Any, name: str) -> Any:
    """Return the value of a field from what YAML holds.

    Args:
        field: The field.
        value: What the YAML loader made of it.
        name: What to call the field in an error.

    Raises:
        ConfigError: It is not of the field's type.
    """
    if value is None and field.optional:
        return None
    if field.kind is bool and isinstance(value, bool):
        return value
    if field.kind in (int, float):
        return _number(field, value, name)
    if field.kind is str:
        return _text(field, value, name)
    if field.kind is dict and isinstance(value, dict):
        return value
    if field.kind is tuple and isinstance(value, str | list | tuple):
        return _texts(field, [value] if isinstance(value, str) else value, name)
    raise _refusal(field, value, name)


def _mapping(given: str) -> Any:
    """Return what YAML makes of the text of a flag; the text itself where it is none."""
    import yaml

    try:
        return yaml.safe_load(given)
    except yaml.YAMLError:
        return given


def _number(field: Field, value: Any, name: str) -> int | float:
    """Return a number; texts count, because YAML 1.1 reads ``1e-4`` as a text."""
    number: int | float
    allowed = str | int if field.kind is int else str | int | float
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise _refusal(field, value, name)
    try:
        number = field.kind(value)
    except (ValueError, OverflowError):
        raise _refusal(field, value, name) from None
    if not math.isfinite(number):
        raise _refusal(field, value, name)
    return number


def _text(field: Field, value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _refusal(field, value, name)
    if not value or "\0" in value:
        raise ConfigError(f"{name}={_short(value)} must be a text that is not empty")
    if field.choices and value not in field.choices:
        known = ", ".join(field.choices)
        hint = did_you_mean(value, field.choices)
        raise ConfigError(f"{name}={_short(value)} must be one of {known}{hint}")
    return value


def _texts(field: Field, values: Iterable[Any], name: str) -> tuple[str, ...]:
    texts = [_text(field, value, name) for value in values]
    if field.name in COMMA_SEPARATED:
        texts = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    if field.required and not texts:
        raise ConfigError(f"{name} needs at least one value")
    return tuple(texts)


def _refusal(field: Field, value: Any, name: str) -> ConfigError:
    null = ", or null" if field.optional and not name.startswith("--") else ""
    allowed = f"one of {', '.join(field.choices)}" if field.choices else _ALLOWED[field.kind]
    return ConfigError(f"{name}={_short(value)} must be {allowed}{null}")


def _short(value: Any) -> str:
    """Return a value for a message, however large or nested it is."""
    return repr(value) if isinstance(value, str) and len(value) < 200 else reprlib.repr(value)
