# SPDX-License-Identifier: Apache-2.0
"""BLAKE3 digests, 64 hex digits: of files while they are written, of files, of plain values."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import blake3

if TYPE_CHECKING:
    from pathlib import Path


class DigestingFile:
    """A file opened for writing that knows the digest of what went in."""

    def __init__(self, path: Path) -> None:
        """Create the file; it must not exist."""
        self._file: BinaryIO = path.open("xb")
        self._hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        self._hasher.update(data)
        self._file.write(data)

    @property
    def digest(self) -> str:
        """Digest of everything written so far."""
        return self._hasher.hexdigest()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()


def digest_file(path: Path) -> str:
    """Return the digest of a file."""
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
    hasher.update_mmap(path)
    return hasher.hexdigest()


def digest_bytes(data: bytes | bytearray | memoryview) -> str:
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
