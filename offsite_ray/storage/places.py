# SPDX-License-Identifier: Apache-2.0
"""Where things lie: a path of this machine, or a URI of any filesystem of pyarrow or fsspec."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from offsite_ray.errors import StorageError, first_line
from offsite_ray.uris import is_uri, shown

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Place:
    """A file, a directory or a prefix; plain enough to be sent to workers."""

    filesystem: Any
    path: str
    """Inside the filesystem; absolute where that is this machine's."""
    name: str
    """What messages call it."""

    @property
    def is_local(self) -> bool:
        """Whether it is on a filesystem of this machine."""
        return isinstance(self.filesystem, LocalFileSystem)

    def below(self, name: str) -> Place:
        """Return what has a name in this directory."""
        parts = (f"{folder.rstrip('/')}/{name}" for folder in (self.path, self.name))
        return Place(self.filesystem, *parts)

    def beside(self, name: str) -> Place:
        """Return what has a name in the directory that this is in.

        Raises:
            StorageError: It is a whole bucket, or the root of a filesystem.
        """
        folders = [folder.rstrip("/").rpartition("/")[0] for folder in (self.path, self.name)]
        if not folders[0].strip("/"):
            raise StorageError(f"{self.name} names no directory of a store; give one in it")
        return Place(self.filesystem, *(f"{folder}/{name}" for folder in folders))

    def is_file(self) -> bool:
        """Return whether there is a file."""
        return bool(self._type() == FileType.File)

    def is_directory(self) -> bool:
        """Return whether there is a directory, or a prefix with something below it."""
        return bool(self._type() == FileType.Directory)

    def files(self) -> Iterator[tuple[Place, int]]:
        """Yield every file in this directory and those in it with its bytes, ordered by path."""
        if self.is_local:
            # pyarrow would follow links to directories, in circles if need be.
            for path in sorted(path for path in Path(self.path).rglob("*") if path.is_file()):
                yield self.below(str(path.relative_to(self.path))), path.stat().st_size
            return
        infos = self.filesystem.get_file_info(FileSelector(self.path, recursive=True))
        for info in sorted(infos, key=lambda info: info.path):
            if info.type == FileType.File:
                yield self.below(info.path[len(self.path.rstrip("/")) + 1 :]), info.size

    def size(self) -> int:
        """Return the bytes of this file."""
        return int(self.filesystem.get_file_info(self.path).size)

    def _type(self) -> Any:
        try:
            return self.filesystem.get_file_info(self.path).type
        except (OSError, pa.ArrowException):
            # Of a text for a name, one that is too long for instance: no, not an error.
            if self.is_local:
                return FileType.NotFound
            raise


def place_of(name: str) -> Place:
    """Return the place that a path or a URI names; nothing needs to be there.

    What pyarrow has no filesystem for is left to fsspec.

    Raises:
        StorageError: Neither knows the URI.
    """
    if not is_uri(name):
        return Place(LocalFileSystem(), os.path.abspath(name), name)
    known_as = shown(name)
    if "#" in name:
        # Everything from there on would be left out in silence.
        raise StorageError(f"{known_as} has a '#', which in a URI is written %23")
    try:
        try:
            filesystem, path = FileSystem.from_uri(name)
        except ValueError as error:
            if "Unrecognized filesystem type" not in str(error):
                raise
            filesystem, path = FileSystem.from_uri(f"fsspec+{name}")
    except (ValueError, OSError, ImportError) as error:
        raise StorageError(
            f"{known_as} is on no filesystem that can be used here: "
            f"{first_line(error).replace(name, known_as)}; give a path, "
            "or a URI of a filesystem of pyarrow (s3://, gs://) or of fsspec, with spaces and what "
            "is not ASCII written as %20 and the like"
        ) from error
    return Place(filesystem, path, path if isinstance(filesystem, LocalFileSystem) else known_as)


def reason(error: Exception) -> str:
    """Return why a filesystem refused, in a few words."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else first_line(error)
