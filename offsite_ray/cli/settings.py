# SPDX-License-Identifier: Apache-2.0
"""The values that a YAML file and ``key=value`` overrides set."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.cli.values import from_yaml
from offsite_ray.errors import ConfigError, StorageError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offsite_ray.cli.fields import Field

_OVERRIDE = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)


def override_key(word: str, verb: str) -> str | None:
    """Return the key of ``key=value`` or ``verb.key=value``; None for any other word."""
    match = _OVERRIDE.fullmatch(word)
    return match[1].removeprefix(f"{verb}.") if match else None


def from_file(path: str, verb: str, fields: Mapping[str, Field], verbs: Iterable[str]) -> Any:
    """Return the values that a YAML file sets.

    Keys are flat, or one level below the verb's name, which wins. What is below the name of another
    verb is left to that verb, so that one file can hold the whole loop.

    Raises:
        StorageError: The file cannot be read.
        ConfigError: It is no YAML mapping, or has an unknown key or a value of the wrong type.
    """
    flat = _mapping(_loaded(_read(path), path), f"{path}:")
    section: Mapping[Any, Any] = {}
    sections = {spelling: name for name in verbs for spelling in (name, name.replace("-", "_"))}
    for key, value in list(flat.items()):
        # "compress" is a verb and a field; a mapping stands below a verb, never below a field
        if key in sections and (isinstance(value, Mapping) or key not in fields):
            below = flat.pop(key)
            if sections[key] == verb and below is not None:
                section = {**section, **_mapping(below, f"{path}: {key}:")}
    return _checked({**flat, **section}, fields, f" in {path}")


def from_section(path: str, verb: str, fields: Mapping[str, Field]) -> Any:
    """Return the values that a YAML file sets below a verb's name, whatever else is in it.

    Raises:
        StorageError: The file cannot be read.
        ConfigError: It is no YAML mapping, or has an unknown key or a value of a wrong type there.
    """
    plain = _mapping(_loaded(_read(path), path), f"{path}:")
    return _checked(_mapping(plain.get(verb), f"{path}: {verb}:"), fields, f" in {path}")


def sections_of(path: str, verbs: Iterable[str]) -> list[str]:
    """Return the verbs that a YAML file has something below the name of.

    Raises:
        StorageError: The file cannot be read.
        ConfigError: It is no YAML mapping.
    """
    plain = _mapping(_loaded(_read(path), path), f"{path}:")
    spellings = {verb: (verb, verb.replace("-", "_")) for verb in verbs}
    return [
        verb
        for verb, names in spellings.items()
        if any(isinstance(plain.get(name), Mapping) for name in names)
    ]


def from_overrides(words: Iterable[str], verb: str, fields: Mapping[str, Field]) -> Any:
    """Return the values that ``key=value`` words set; a value is read as YAML reads it.

    Raises:
        ConfigError: A key is unknown, or a value of the wrong type.
    """
    values = {}
    for word in words:
        key = override_key(word, verb)
        text = word.partition("=")[2]
        field = fields.get(key or "")
        value = text
        if field is not None and (field.kind is not str or _is_quoted(text)):
            value = _loaded(text, word)
        values[key] = value
    return _checked(values, fields, "")


def _is_quoted(text: str) -> bool:
    """Whether YAML makes something else of a text: it is null, or stands in quotes."""
    return text in ("null", "~") or (len(text) > 1 and text[0] == text[-1] and text[0] in "'\"")


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read --config {path}: {error.strerror}") from error


def _loaded(source: bytes | str, name: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{name} is no valid YAML: {error.problem}{where}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} is no valid YAML: {reason}") from error


def _mapping(value: Any, name: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping | None):
        raise ConfigError(f"{name} expected keys with values, not {reprlib.repr(value)}")
    return dict(value or {})


def _checked(values: Mapping[Any, Any], fields: Mapping[str, Field], where: str) -> dict[str, Any]:
    for key in values:
        if key not in fields:
            raise ConfigError(unknown_name("key", str(key), fields) + where)
    return {key: _value(fields[key], value, where) for key, value in values.items()}


def _value(field: Field, value: Any, where: str) -> Any:
    try:
        return from_yaml(field, value, field.name)
    except ConfigError as error:
        raise ConfigError(f"{error}{where}") from None
