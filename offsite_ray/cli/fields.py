# SPDX-License-Identifier: Apache-2.0
"""The fields of a configuration class, read from the class: name, type, default and help text."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union

COMMA_SEPARATED = ("tasks", "task_data")
"""Fields of several values that may also be given as ``a,b``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One field of a configuration: a flag, and a key of its YAML."""

    name: str
    kind: type
    """``str``, ``int``, ``float``, ``bool``, ``tuple`` (several texts) or ``dict`` (a mapping)."""
    choices: tuple[str, ...] = ()
    """The texts that are allowed; empty: any."""
    optional: bool = False
    """Whether None is a value."""
    default: Any = dataclasses.MISSING
    help: str = ""
    shared: str = ""
    """Of a field of a base class, which several verbs share: what these knobs are of."""
    given: str = ""
    """How it is given, where by no flag of its own: what is meant for another verb."""

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is dataclasses.MISSING

    @property
    def flag(self) -> str:
        """The flag: ``--learning-rate`` for ``learning_rate``."""
        return f"--{self.name.replace('_', '-')}"


@functools.cache
def fields_of(config: type) -> dict[str, Field]:
    """Return the fields of a configuration class by name, in order."""
    hints = typing.get_type_hints(config)
    texts = _help_texts(config)
    found = {}
    for field in dataclasses.fields(config):
        kind, choices, optional = _kind(hints[field.name])
        found[field.name] = Field(
            name=field.name,
            kind=kind,
            choices=choices,
            optional=optional,
            default=field.default,
            help=texts.get(field.name, ""),
            shared="" if field.name in config.__annotations__ else _shared(config),
            given=field.metadata.get("given", ""),
        )
    return found


def _shared(config: type) -> str:
    """Return what the knobs of a base class are of, by its name: "training"."""
    return config.__bases__[0].__name__.removesuffix("Config").lower()


def _kind(hint: Any) -> tuple[type, tuple[str, ...], bool]:
    """Return what a type hint says: the kind, the choices, and whether None is a value."""
    if typing.get_origin(hint) in (Union, UnionType):
        (inner,) = (part for part in typing.get_args(hint) if part is not NoneType)
        kind, choices, _ = _kind(inner)
        return kind, choices, True
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint), False
    kind = typing.get_origin(hint) or hint
    if kind is Mapping:
        return dict, (), False
    if kind not in (str, int, float, bool, tuple):
        raise TypeError(f"no flag can be made of a field of type {hint}")
    return kind, (), False


def _help_texts(config: type) -> dict[str, str]:
    """Return the string below each field, of the class and its bases."""
    texts: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        for node in _classes(cls.__module__):
            if node.name == cls.__name__:
                texts |= _texts_below(node)
    return texts


@functools.cache
def _classes(module: str) -> list[ast.ClassDef]:
    try:
        source = inspect.getsource(sys.modules[module])
    except OSError:  # installed without sources: flags without help texts
        return []
    return [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]


def _texts_below(node: ast.ClassDef) -> dict[str, str]:
    texts = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts
