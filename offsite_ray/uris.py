# SPDX-License-Identifier: Apache-2.0
"""Names of artefacts: paths of a machine, or URIs of stores, whose secrets nobody repeats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_NOT_AZURE = r"(?<=://)(?![^\s'\"/:?@]+@[^\s'\"/:?@]+\.(?:dfs|blob)\.)"
"""Where a key may begin; not before ``CONTAINER@ACCOUNT.dfs...``, which is a place."""
_SECRETS = re.compile(rf"{_NOT_AZURE}.*@|(?<=://)([^?]*)\?.*")
_IN_TEXT = re.compile(rf"{_NOT_AZURE}[^\s'\"]*@|(?<=://)([^\s'\"?]*)\?[^\s'\";,]*")
"""The key and the options that a URI may have; alone, and in a sentence."""
_KEY = re.compile(
    r"://[^/\s:@\"']*:(?!\d+(?:[/\s]|$))[^\s\"']*@"
    r"|://[^\s\"'?]*\?[^\s\"']*(?:key|secret|token|password|credential|sig)[^\s\"'=&]*=",
    re.IGNORECASE,
)
"""A key for certain: ``USER:PASSWORD@``, not a port, or an option that is called like one."""


def is_uri(name: str | Path) -> bool:
    """Return whether a name is a URI and not a path."""
    return _URI.match(str(name)) is not None


def shown(name: str) -> str:
    """Return a name as messages and results may repeat it: a URI without its key and options.

    Also where it stands behind something else, as in ``NAME=URI``.
    """
    return _without(_SECRETS, name)


def scrubbed(text: str) -> str:
    """Return a sentence in which no URI has a key or options."""
    return _without(_IN_TEXT, text)


def has_key(text: str) -> bool:
    """Return whether a URI in a text has a password, or an option that is called like a key."""
    return _KEY.search(text) is not None


def without_secrets(plain: Any, clean: Callable[[str], str] = shown) -> Any:
    """Return plain values with every text in them as :func:`shown` or :func:`scrubbed` returns it.

    Before they are written as JSON or YAML, in whose marks and escapes an address has no end.
    """
    if isinstance(plain, str):
        return clean(plain)
    if isinstance(plain, Mapping):
        return {key: without_secrets(value, clean) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [without_secrets(value, clean) for value in plain]
    return plain


def refuse_uri(flag: str, name: str | None) -> None:
    """Refuse a URI where only a path will do; raise :class:`ConfigError`."""
    if name is not None and is_uri(name):
        raise ConfigError(f"{flag} {shown(name)} must be a path of this machine, not a URI")


def _without(secrets: re.Pattern[str], text: str) -> str:
    while (less := secrets.sub(lambda found: found[1] or "", text)) != text:
        text = less
    return text
