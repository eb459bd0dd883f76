# SPDX-License-Identifier: Apache-2.0
"""BLAKE3 digests, 64 hex digits: of files while they are written, of files, of plain values."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import blake3

from offsite_ray.bundle.windows import WINDOW_BYTES, windows

if TYPE_CHECKING:
    from pathlib import Path

Bytes = bytes | bytearray | memoryview

_WRITE_BYTES = 256 * 2**10
"""What one call writes: from more, the kernel is slower by half."""

_SMALL_BYTES = 2**20
"""Up to which another thread costs more than it saves."""


class DigestingFile:
    """A file opened for writing that knows the digest of what went in.

    The digest is computed while a thread writes, so what is written must not change before the file
    is closed.
    """

    def __init__(self, path: Path) -> None:
        """Create the file; it must not exist."""
        self._file = path.open("xb", buffering=0)
        self._hasher = new_hasher()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._pending: Future[None] | None = None
        self._unsent = 0

    def write(self, data: Bytes) -> None:
        """Append bytes."""
        view = memoryview(data)
        for start in range(0, len(view), WINDOW_BYTES):
            piece = view[start : start + WINDOW_BYTES]
            self._wait()
            if len(piece) > _SMALL_BYTES:
                self._pending = self._thread.submit(self._append, piece)
            else:
                self._append(piece)
            self._hasher.update(piece)

    def _append(self, piece: memoryview) -> None:
        written = 0
        while written < len(piece):
            written += self._file.write(piece[written : written + _WRITE_BYTES])
        self._unsent += written
        if self._unsent > WINDOW_BYTES // 2:
            # Has the disk begin, so that there is little left to wait for when the file is synced.
            begin = self._file.tell() - self._unsent
            os.posix_fadvise(self._file.fileno(), begin, self._unsent, os.POSIX_FADV_DONTNEED)
            self._unsent = 0

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @property
    def digest(self) -> str:
        """Digest of everything written so far."""
        return self._hasher.hexdigest()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file, once everything is in it.

        Raises:
            OSError: Something could not be written.
        """
        with self._file, self._thread:
            self._wait()


def new_hasher() -> blake3.blake3:
    """Return what computes a digest, on all cores where it is given enough at once."""
    return blake3.blake3(max_threads=blake3.blake3.AUTO)


def digest_file(path: Path) -> str:
    """Return the digest of a file."""
    hasher = new_hasher()
    with path.open("rb") as file:
        for piece in windows(file, 0, os.fstat(file.fileno()).st_size):
            hasher.update(piece)
    return hasher.hexdigest()


def digest_bytes(data: Bytes) -> str:
    """Return the digest of bytes."""
    return blake3.blake3(data, max_threads=blake3.blake3.AUTO).hexdigest()


def digest_plain(value: Any) -> str:
    """Return the digest of JSON-like values, the same for the same values."""
    return digest_bytes(canonical_json(value).encode())


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; for ``object_pairs_hook``, to refuse one that names a value twice.

    JSON readers disagree on which of the two counts.

    Raises:
        ValueError: A name occurs twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
