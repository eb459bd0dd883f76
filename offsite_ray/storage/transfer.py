# SPDX-License-Identifier: Apache-2.0
"""Files between this machine and a store: what fails for a moment is tried again."""

from __future__ import annotations

import errno
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa
from pyarrow.fs import FileSelector, FileType

from offsite_ray.bundle.digest import DigestingFile
from offsite_ray.bundle.windows import windows
from offsite_ray.errors import OffsiteError, StorageError
from offsite_ray.storage.places import reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path
    from typing import Any

    from offsite_ray.storage.places import Place

_T = TypeVar("_T")
_Item = TypeVar("_Item")

_ATTEMPTS = 6
_FIRST_PAUSE_S = 0.4
"""Doubled from attempt to attempt. In each, the filesystem tries again by itself too: pyarrow's S3
for some ten seconds, so that an outage of a minute is survived."""
_PIECE_BYTES = 32 * 2**20
_AT_ONCE = 4
"""Files on their way at a time, each with two pieces in memory."""

PROBE = ".offsite-probe"
"""File by which is found out whether one may write; only a killed process leaves it."""

_FINAL = (
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    PermissionError,
    TypeError,
    ValueError,
    pa.ArrowInvalid,
)
_FINAL_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)
_FINAL_WORDS = (
    "ACCESS_DENIED",
    "NO_SUCH_BUCKET",
    "allow_bucket_creation",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE",
)
"""What a store says of a request that no time will mend."""


def retried(action: Callable[[], _T], place: Place, verb: str = "read") -> _T:
    """Return what an action on a store returns; one that fails for a moment is done again.

    Args:
        action: May be done any number of times.
        place: What it is done to.
        verb: Done to it, for the error.

    Raises:
        StorageError: It fails for good.
    """
    attempt = 1
    while True:
        try:
            return action()
        except OffsiteError:
            raise
        except Exception as error:  # filesystems of fsspec have errors of their own
            if attempt == _ATTEMPTS or _is_final(error):
                raise StorageError(f"{place.name} cannot be {verb}: {reason(error)}") from error
        time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1))
        attempt += 1


def _is_final(error: Exception) -> bool:
    number = getattr(error, "errno", None)
    said = isinstance(error, _FINAL) or any(word in str(error) for word in _FINAL_WORDS)
    return said or number in _FINAL_NUMBERS


def in_parallel(action: Callable[[_Item], _T], items: Iterable[_Item]) -> list[_T]:
    """Return what an action returns of each item, a few at a time."""
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="storage") as pool:
        return list(pool.map(action, items))


def infos_of(places: Sequence[Place]) -> list[Any]:
    """Return what the store says of each of some files of one filesystem: type, size, time."""
    if not places:
        return []
    paths = [place.path for place in places]
    infos = retried(lambda: places[0].filesystem.get_file_info(paths), places[0])
    return list(infos)


def entries_of(place: Place) -> dict[str, Any]:
    """Return what is directly below a directory or prefix, by name; nothing where there is none."""
    selector = FileSelector(place.path, allow_not_found=True)
    infos = retried(lambda: place.filesystem.get_file_info(selector), place)
    return {info.base_name: info for info in infos if info.type != FileType.NotFound}


def read_small(place: Place, most: int) -> bytes | None:
    """Return the bytes of a small file; None: there is none, or it has more than ``most``."""

    def read() -> bytes | None:
        try:
            with place.filesystem.open_input_stream(place.path) as file:
                found: bytes = file.read(most + 1)
        except FileNotFoundError:
            return None
        return found if len(found) <= most else None

    return retried(read, place)


def download(source: Place, target: Path, size: int) -> str:
    """Copy a file of a store to a new one of this machine; return its digest.

    Raises:
        StorageError: The store refuses, or the file became shorter.
        OSError: This machine's disk does.
    """

    def read(start: int) -> bytes:
        # Opened anew: what has failed once may not work again.
        with source.filesystem.open_input_file(source.path) as file:
            found: bytes = file.read_at(min(_PIECE_BYTES, size - start), start)
        return found

    with DigestingFile(target) as sink:
        for start in range(0, size, _PIECE_BYTES):
            piece = retried(lambda start=start: read(start), source)  # type: ignore[misc]
            if len(piece) != min(_PIECE_BYTES, size - start):
                raise StorageError(f"{source.name} was changed while it was read; try again")
            sink.write(piece)
        return sink.digest


def make_directory(place: Place) -> None:
    """Make a directory; prefixes of S3 and GCS are there as soon as something is below them.

    To make one would write an object for each folder above it, which is denied to who may write
    only below that prefix.
    """
    if place.filesystem.type_name not in ("s3", "gcs"):
        retried(lambda: place.filesystem.create_dir(place.path, recursive=True), place, "written")


def check_writable(folder: Place) -> None:
    """Write a file to a directory or prefix and remove it again, before work is done for it.

    Raises:
        StorageError: The store refuses.
    """
    make_directory(folder)
    probe = replace(folder.below(PROBE), name=folder.name)
    write_small(probe, b"")
    remove(probe)


def upload(source: Path, target: Place) -> None:
    """Copy a file of this machine to a store, in the place of what has that name there.

    Raises:
        StorageError: The store refuses.
    """
    size = source.stat().st_size

    def write() -> None:
        with (
            source.open("rb") as file,
            target.filesystem.open_output_stream(target.path) as stream,
        ):
            for piece in windows(file, 0, size):
                stream.write(piece)
        if target.size() != size:
            raise OSError(f"{target.size()} of {size} bytes arrived")

    retried(write, target, "written")


def write_small(target: Place, content: bytes) -> None:
    """Write a small file of a store; raise :class:`StorageError` where it refuses."""

    def write() -> None:
        with target.filesystem.open_output_stream(target.path) as stream:
            stream.write(content)

    retried(write, target, "written")


def remove(place: Place) -> None:
    """Remove a file of a store, if it is there."""

    def delete() -> None:
        try:
            place.filesystem.delete_file(place.path)
        except FileNotFoundError:
            return

    retried(delete, place, "removed")
