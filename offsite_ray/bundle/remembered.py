# SPDX-License-Identifier: Apache-2.0
"""Digests of large files that nobody has touched since they were read, kept between runs.

So a full model that many adapters are plugged into is read once. As in git's index, a file is
untouched if its device, inode, size and time of modification are what they were. Where that is
wrong, a manifest is written that ``verify`` refuses, for what verifies reads every byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
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
"""Some file systems count time in two seconds: what is younger may change without a trace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigests:
    """What is known of a safetensors file."""

    state: Mapping[str, int]
    """By which the file is known to be untouched."""
    whole: str | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Name to digest of its bytes, of some of its tensors."""


def nothing_known(file: Path) -> FileDigests:
    """Return no digests of a file that is about to be read."""
    stat = file.stat()
    return FileDigests(state={"size": stat.st_size, "mtime_ns": stat.st_mtime_ns})


def recall(file: Path) -> FileDigests:
    """Return the digests that are known of a file, and that it still has."""
    nothing = nothing_known(file)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or no entry
        values = json.loads(_place(file).read_text(encoding="utf-8"))
        if values["state"] == nothing.state:
            return FileDigests(
                state=nothing.state, whole=values["whole"], tensors=dict(values["tensors"])
            )
    return nothing


def remember(file: Path, found: FileDigests) -> None:
    """Keep the digests of a file that was just read; where they cannot be kept, they are not."""
    age = time.time_ns() - found.state["mtime_ns"]
    if found.state["size"] < _LEAST_BYTES or age < _SETTLED_NS:
        return
    with contextlib.suppress(StorageError), atomic_file(_place(file)) as tmp:
        tmp.write_text(json.dumps(to_plain(found)), encoding="utf-8")


def _place(file: Path) -> Path:
    stat = file.stat()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "offsite_ray" / "digests" / f"{stat.st_dev:x}-{stat.st_ino:x}.json"
