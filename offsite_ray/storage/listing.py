# SPDX-License-Identifier: Apache-2.0
"""What lies at a URI: which files make up the artefact there, and their digests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from pyarrow.fs import FileType

from offsite_ray.bundle.manifest import MANIFEST
from offsite_ray.errors import IntegrityError, StorageError
from offsite_ray.storage.transfer import entries_of, infos_of, read_small

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from offsite_ray.storage.places import Place

DATA_MANIFEST = "offsite-data.json"
UPLOAD = "offsite-upload.json"
"""The files of an upload with their digests. It is written before them, and beside a model that has
no manifest of its own it stays."""
CONFIG = "config.json"

LAST = (MANIFEST, DATA_MANIFEST, CONFIG)
"""The file that is written last: the first of these that an artefact has."""

MOST_BYTES = 64 * 2**20
"""Of a manifest."""
_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Of the files that are taken of a directory without a manifest: neither pickles nor code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """An upload, as its list says that it is to become."""

    digests: Mapping[str, str]
    """Of every file."""
    last: str | None
    """The file that is written last; None: the list itself is damaged."""

    def is_done(self, names: Collection[str]) -> bool:
        """Return whether the upload came to its end, by the names of what is there."""
        return self.last is not None and self.last in names


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The files of an artefact at a URI."""

    place: Place
    sizes: Mapping[str, int]
    """Name to bytes, of every file but the manifest."""
    times: Mapping[str, int]
    """Name to when it was written, nanoseconds since 1970; -1 where the store does not say."""
    digests: Mapping[str, str]
    """Name to BLAKE3 digest, where a manifest or an upload has put it down."""
    told_by: str
    """File that has the digests."""
    manifests: Mapping[str, bytes]
    """The manifest, by its name; none of a model that has none."""


def list_artefact(place: Place, only: Collection[str] = ()) -> Listing:
    """Return the files of what lies at a URI.

    Args:
        place: A directory or prefix.
        only: Names of the files that are wanted; by default all.

    Raises:
        StorageError: There is nothing, or an upload that did not come to its end.
        IntegrityError: The manifest is none, or names a file that is missing.
    """
    entries = entries_of(place)
    manifest = next((name for name in (MANIFEST, DATA_MANIFEST) if name in entries), None)
    if not entries:
        raise StorageError(f"there is nothing at {place.name}")
    begun = read_begun(place) if UPLOAD in entries else None
    if begun is not None and not begun.is_done(entries):
        raise StorageError(
            f"{place.name} holds what an upload left that was ended before its end; write it again"
        )
    content = b"" if manifest is None else _content(place.below(manifest))
    digests: Mapping[str, str] = begun.digests if begun is not None else {}
    if manifest is not None:
        digests = _digests(place.below(manifest), content)
    told_by = manifest or (UPLOAD if begun is not None else "")
    names = set(digests)
    if not told_by:
        files = (name for name, info in entries.items() if info.type == FileType.File)
        names = {name for name in files if name.endswith(_SUFFIXES)}
    wanted = sorted(names & set(only)) if only else sorted(names)
    infos = {name: entries[name] for name in wanted if name in entries}
    others = [name for name in wanted if name not in infos]
    infos |= zip(others, infos_of([place.below(name) for name in others]), strict=True)
    if lacking := [name for name, info in infos.items() if info.type != FileType.File]:
        raise IntegrityError(f"{place.name} lacks {lacking[0]!r}, which its {told_by} names")
    if not wanted and manifest is None:
        raise StorageError(f"{place.name} holds no model, bundle or prepared data")
    return Listing(
        place=place,
        sizes={name: int(info.size) for name, info in infos.items()},
        times={name: -1 if (t := info.mtime_ns) is None else t for name, info in infos.items()},
        digests={name: digests[name] for name in wanted if name in digests},
        told_by=told_by,
        manifests={} if manifest is None else {manifest: content},
    )


def read_begun(place: Place) -> Begun | None:
    """Return the list of an upload; None: there is none."""
    content = read_small(place.below(UPLOAD), MOST_BYTES)
    if content is None:
        return None
    try:
        last = json.loads(content)["last"]
        return Begun(digests=_digests(place.below(UPLOAD), content), last=str(last))
    except (ValueError, KeyError, TypeError, IntegrityError):
        return Begun(digests={}, last=None)


def _content(place: Place) -> bytes:
    content = read_small(place, MOST_BYTES)
    if content is None:
        raise IntegrityError(f"{place.name} was removed, or is over {MOST_BYTES} bytes; refused")
    return content


def _digests(place: Place, content: bytes) -> dict[str, str]:
    """Return what a manifest or an upload says of each file; its readers check the rest of it."""
    try:
        files: Any = json.loads(content)["files"]
        # Prepared data lists its files in the order of their blocks.
        pairs = (
            files.items()
            if isinstance(files, dict)
            else [(file["name"], file["digest"]) for file in files]
        )
        found = {str(name): str(digest) for name, digest in pairs}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{place.name} is no manifest: {error!r}") from error
    for name in found:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise IntegrityError(f"{place.name} names the file {name!r}, which is not below it")
    return found
