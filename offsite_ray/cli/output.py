# SPDX-License-Identifier: Apache-2.0
"""What stdout gets: the result of a verb, as a summary or as one JSON object, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offsite_ray.results import bytes_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TextIO

    from rich.console import RenderableType

_MOST_ENTRIES = 20
"""Entries of a nested list or mapping that a summary shows."""
_MOST_CHARACTERS = 100
"""Characters of a list on one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a verb gives back to be printed."""

    plain: Mapping[str, Any]
    """What ``--json`` prints."""
    table: RenderableType | None = None
    """What stands in for the summary of ``plain``, if anything."""
    then: Callable[[], None] | None = None
    """What is still to be done once it is printed: a server goes on until it is told to end."""


@contextlib.contextmanager
def stdout_reserved(*, for_good: bool) -> Iterator[TextIO]:
    """Give the real stdout, while everything that others print there goes to stderr.

    It is the file descriptor that is turned over, so C++ and child processes are covered.

    Args:
        for_good: Leave it so afterwards: a thread that still prints at exit (Ray's do) cannot
            follow the result. Only for a process that is the command line's own.
    """
    sys.stdout.flush()
    saved = os.dup(1)
    real = _stream(saved)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield real
    finally:
        if not for_good:
            os.dup2(saved, 1)
            os.close(saved)


def _stream(saved: int) -> TextIO:
    """Return a stream on a copy of stdout; sys.stdout itself where it is no file (in a test)."""
    try:
        if sys.stdout.fileno() != 1:
            return sys.stdout
    except OSError:
        return sys.stdout
    return open(saved, "w", encoding=sys.stdout.encoding, closefd=False)


def ensure_streams() -> None:
    """Fill in for a closed stdout or stderr, whose number the next opened file would get."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def write(stream: TextIO, text: str) -> None:
    """Write text and a newline; quiet where the reader has gone (``| head``)."""
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except OSError as error:
        # what is still buffered must not raise again when the stream is closed
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)
        if not isinstance(error, BrokenPipeError):
            raise


def show(outcome: Outcome, stream: TextIO, *, as_json: bool) -> None:
    """Write what a verb gave back."""
    if as_json:
        write(stream, json.dumps(outcome.plain, indent=2, allow_nan=False))
    elif outcome.table is not None:
        write(stream, _rendered(outcome.table, stream))
    else:
        write(stream, summary(outcome.plain))


def _rendered(table: RenderableType, stream: TextIO) -> str:
    from rich.console import Console

    terminal = stream.isatty()
    width = None if terminal else 160
    # A path may have [brackets] and :names: in it; what is to have a style is a Text.
    console = Console(force_terminal=terminal, width=width, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def summary(plain: Mapping[str, Any]) -> str:
    """Return a mapping as aligned lines of name and value, nested ones indented."""
    return "\n".join(_lines(plain))


def printable(text: str) -> str:
    """Return text without control characters: a bundle of others must not drive the terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _lines(plain: Mapping[str, Any], indent: str = "") -> list[str]:
    names = {key: printable(key.replace("_", " ")) for key in plain}
    width = max(map(len, names.values()), default=0)
    lines = []
    for key, value in list(plain.items())[:_MOST_ENTRIES] if indent else plain.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{names[key]}", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{names[key]:<{width}}  {_shown(key, value)}")
    if indent and len(plain) > _MOST_ENTRIES:
        lines.append(f"{indent}... and {len(plain) - _MOST_ENTRIES} more; --json has all")
    return lines


def _shown(key: str, value: Any) -> str:
    """Return a value for people, with the unit that its name has."""
    if value is None:
        counted = key.startswith("num_") or key.endswith(("bytes", "seconds"))
        return "not measured" if counted else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and key.endswith("bytes"):
        return bytes_text(value)
    if isinstance(value, float):
        return f"{value:.1f} s" if key.endswith("seconds") else f"{value:.5g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _listed(value)
    return printable(str(value)) or "none"


def _listed(values: Sequence[Any]) -> str:
    if any(isinstance(value, Mapping | list | tuple) for value in values):
        return f"{len(values)} entries; --json has them"
    shown = [_shown("", value) for value in values[:_MOST_ENTRIES]]
    while len(shown) > 1 and len(", ".join(shown)) > _MOST_CHARACTERS:
        shown.pop()
    more = f", ... ({len(values)} in all)" if len(shown) < len(values) else ""
    return ", ".join(shown) + more or "none"
