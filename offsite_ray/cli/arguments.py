# SPDX-License-Identifier: Apache-2.0
"""From the words behind a verb to its configuration.

The flags are made of the fields of the configuration class, with argparse. jsonargparse would read
the classes too, but it adds its own start-up time, abbreviations and errors of many lines.
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from offsite_ray.cli.fields import fields_of
from offsite_ray.cli.settings import (
    from_file,
    from_overrides,
    from_section,
    override_key,
    sections_of,
)
from offsite_ray.cli.values import from_flag
from offsite_ray.config import RUNS, check_run_name
from offsite_ray.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from offsite_ray.cli.fields import Field
    from offsite_ray.cli.verb import Verb

POSITIONALS = ("path", "verb")
"""The fields that are given without a flag; a verb has one of them, or none."""

_METAVARS: dict[type, str] = {int: "N", float: "X"}
_EPILOGS = (
    "KEY=VALUE sets a field by its name in YAML, e.g. 'seed=1'. Flags win over KEY=VALUE, and "
    "these over the file of --config.",
    "The file of --config and KEY=VALUE are for the verb that is given; what the file has below "
    "this one's name is for this one, and flags win over it.",
)
"""Of a verb that takes them itself, and of one that passes them on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the command line asks of a verb."""

    config: Any
    """An instance of the verb's configuration class."""
    json: bool
    run: str | None = None
    """Name under which a record is kept; None: none is."""
    runs: str | None = None
    """Directory that it is kept in."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def help_text(verb: Verb) -> str:
    """Return the help of a verb."""
    return _parser(verb).format_help()


def wants_help(words: Sequence[str]) -> bool:
    """Whether help is asked for, whatever else is."""
    flags = words[: words.index("--")] if "--" in words else words
    return "-h" in flags or "--help" in flags


def parse(verb: Verb, words: Sequence[str], verbs: Iterable[str]) -> Request:
    """Return what is asked of a verb: flags win over ``key=value``, these over the YAML file.

    Args:
        verb: The verb.
        words: What stands behind it.
        verbs: The names of all verbs.

    Raises:
        OffsiteError: Something is unknown, missing, or not of its type.
    """
    fields = fields_of(verb.config)
    parser = _parser(verb)
    known, rest = parser.parse_known_args(list(words))
    given = vars(known)
    overrides, values = _sorted_out(verb, rest, parser)
    path, as_json = given.pop("config", None), given.pop("json")
    run, runs = _run_of(given) if verb.recorded else (None, None)
    for name, value in given.items():
        if fields[name].kind is tuple:
            value = _without_overrides(verb, value, overrides)
        values[name] = from_flag(fields[name], value)
    passed_on = {"--config": path, "KEY=VALUE": tuple(overrides)}
    for_other = {field.name: passed_on[field.given] for field in fields.values() if field.given}
    if for_other:
        merged = {} if path is None else from_section(path, verb.name, fields)
        merged |= for_other | values
    else:
        merged = {} if path is None else from_file(path, verb.name, fields, verbs)
        merged |= from_overrides(overrides, verb.name, fields) | values
    _check_complete(verb, merged, [] if path is None else sections_of(path, verbs))
    return Request(config=verb.config(**merged), json=as_json, run=run, runs=runs)


def _run_of(given: dict[str, Any]) -> tuple[str | None, str | None]:
    """Take the name and the directory of a run out of the flags; return them."""
    run, runs = given.pop("run", None), given.pop("runs", None)
    if run is None and runs is not None:
        raise ConfigError("--runs needs --run NAME, the name that the run has there")
    runs = runs or os.environ.get(RUNS)
    if run is not None:
        check_run_name(run, "--run")
        if not runs:
            raise ConfigError(f"--run {run} needs --runs DIR, or {RUNS}: where its record is kept")
    return run, runs


def _sorted_out(
    verb: Verb, rest: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[list[str], dict[str, Any]]:
    """Return the overrides and the positional value among words that belong to no flag."""
    overrides: list[str] = []
    values: dict[str, Any] = {}
    only_words = False
    positional = next((f for f in fields_of(verb.config).values() if f.name in POSITIONALS), None)
    for word in rest:
        if word == "--" and not only_words:
            only_words = True
        elif word.startswith("-") and not only_words:
            flags = (flag for action in parser._actions for flag in action.option_strings)
            raise ConfigError(unknown_name("flag", word.partition("=")[0], flags))
        elif override_key(word, verb.name) is not None and not only_words:
            overrides.append(word)
        elif positional is not None and not values:
            values[positional.name] = from_flag(positional, word)
        else:
            raise ConfigError(f"{verb.name} has no use for {word!r}; values stand behind a flag")
    return overrides, values


def _without_overrides(verb: Verb, words: list[str], overrides: list[str]) -> list[str]:
    """Move ``key=value`` behind a flag that takes several values to the overrides.

    Only where the key is one of the verb's; a file of that name can be given as ``./key=value``.
    """
    keys = fields_of(verb.config)
    moved = [word for word in words if override_key(word, verb.name) in keys]
    overrides += moved
    return [word for word in words if word not in moved]


def _check_complete(verb: Verb, values: Mapping[str, Any], sections: Sequence[str]) -> None:
    missing = [
        field.name.upper() if field.name in POSITIONALS else field.flag
        for field in fields_of(verb.config).values()
        if field.required and field.name not in values
    ]
    if not missing:
        return
    of_others = (
        f"the file has nothing for it, only for {', '.join(sections)}"
        if sections and verb.name not in sections
        else f"see 'offsite-ray {verb.name} --help'"
    )
    raise ConfigError(f"{verb.name} needs {' and '.join(missing)}; {of_others}")


def _parser(verb: Verb) -> argparse.ArgumentParser:
    fields = fields_of(verb.config)
    parser = _Parser(
        prog=f"offsite-ray {verb.name}",
        usage=_usage(verb),
        description=verb.summary,
        epilog=_EPILOGS[any(field.given for field in fields.values())],
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
    )
    groups = {title: parser.add_argument_group(title) for title in ("required", "optional")}
    for field in fields.values():
        if field.name in POSITIONALS or field.given:
            continue
        title = "required" if field.required else field.shared or "optional"
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        group.add_argument(field.flag, help=_help(field, fields), **_options(field))
    common = parser.add_argument_group("with every verb")
    common.add_argument("--config", metavar="FILE", help="YAML file with values, by field name")
    common.add_argument(
        "--json", action="store_true", default=False, help="Print the result as one JSON object"
    )
    if verb.recorded:
        common.add_argument("--run", metavar="NAME", help="Keep a record under this name")
        common.add_argument(
            "--runs", metavar="DIR", help=f"Directory of such records (default: {RUNS})"
        )
    common.add_argument("-h", "--help", action="store_true", help="Print this and exit")
    return parser


def _usage(verb: Verb) -> str:
    parts = [f"offsite-ray {verb.name}"]
    for field in fields_of(verb.config).values():
        if field.name in POSITIONALS:
            parts.append(field.name.upper())
        elif field.required:
            more = " ..." if field.kind is tuple else ""
            parts.append(f"{field.flag} {field.name.upper()}{more}")
    return " ".join([*parts, "[options] [KEY=VALUE ...]"]).replace("%", "%%")


def _options(field: Field) -> dict[str, Any]:
    """Return how argparse takes a field's flag."""
    if field.kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    metavar = f"{{{','.join(field.choices)}}}" if field.choices else _METAVARS.get(field.kind)
    several = {"nargs": "+", "action": "extend"} if field.kind is tuple else {}
    return {"metavar": metavar or field.name.upper(), **several}


def _help(field: Field, fields: Mapping[str, Field]) -> str:
    """Return a field's help: other fields named as flags, the default where it is a plain value."""

    def as_flag(match: re.Match[str]) -> str:
        return fields[match[1]].flag if match[1] in fields else match[1]

    text = re.sub(r"`([^`]+)`", as_flag, field.help).removesuffix(".")
    if not field.required and field.default not in (None, ()):
        default = field.default
        if isinstance(default, bool):
            default = "on" if default else "off"
        elif isinstance(default, tuple):
            default = " ".join(map(str, default))
        text += f" (default: {default})"
    return text.replace("%", "%%")
