# SPDX-License-Identifier: Apache-2.0
"""Digests of large files that nobody has touched since they were read, kept between runs.

So a full model that many adapters are plugged into is read once. As in git's index, a file is
untouched if its path, device, inode, size and time of modification are what they were. Who changes
a file and sets its time back deceives himself; what verifies reads every byte nevertheless.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from offsite_ray.bundle.atomic import atomic_file
from offsite_ray.errors import StorageError
from offsite_ray.results import to_plain

if TYPE_CHECKING:
    from collections.abc import Mapping

_LEAST_BYTES = 16 * 2**20
"""Below which reading a file is as quick as asking."""

_SETTLED_NS = 2 * 10**9
"""Some file systems count time in two seconds: what was younger when it was read may have changed
since without a trace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigests:
    """What is known of a safetensors file."""

    state: Mapping[str, int | str]
    """By which the file is known to be untouched."""
    seen: int = field(compare=False)
    """When that was so, in nanoseconds since 1970."""
    whole: str | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Name to digest of its bytes, of some of its tensors."""


def nothing_known(file: Path) -> FileDigests:
    """Return no digests of a file that is about to be read."""
    seen, stat = time.time_ns(), file.stat()
    state: dict[str, int | str] = {
        "path": str(file.resolve()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
    }
    return FileDigests(state=state, seen=seen)


def recall(file: Path) -> FileDigests:
    """Return the digests that are known of a file, and that it still has."""
    nothing, place = nothing_known(file), _place(file)
    if place is None:
        return nothing
    try:
        values = json.loads(place.read_text(encoding="utf-8"))
        if values["state"] == nothing.state:
            return replace(nothing, whole=values["whole"], tensors=dict(values["tensors"]))
    except (OSError, ValueError, KeyError, TypeError):  # none, or no entry
        return nothing
    return nothing


def remember(file: Path, found: FileDigests) -> None:
    """Keep the digests of a file that was just read; where they cannot be kept, they are not."""
    stat, place = file.stat(), _place(file)
    settled = found.seen - stat.st_mtime_ns >= _SETTLED_NS
    if place is None or stat.st_size < _LEAST_BYTES or not settled:
        return
    with contextlib.suppress(StorageError), atomic_file(place) as tmp:
        tmp.write_text(json.dumps(to_plain(found)), encoding="utf-8")


def _place(file: Path) -> Path | None:
    stat, folder = file.stat(), user_cache("digests")
    return None if folder is None else folder / f"{stat.st_dev:x}-{stat.st_ino:x}.json"


def user_cache(kind: str) -> Path | None:
    """Return the user's folder for something that can be had again; None: there is no home."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user that a container made up
        return None
    return base / "offsite_ray" / kind
