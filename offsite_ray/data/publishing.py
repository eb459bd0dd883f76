# SPDX-License-Identifier: Apache-2.0
"""Prepared data under its final name: whole and with a manifest, or not at all."""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from offsite_ray.bundle import atomic_directory
from offsite_ray.errors import StorageError
from offsite_ray.storage import (
    DATA_MANIFEST,
    PROBE,
    Place,
    check_writable,
    entries_of,
    make_directory,
    reason,
    write_small,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from offsite_ray.data.manifest import DataManifest


_OWN = re.compile(rf"[0-9a-f]{{8}}|{re.escape(PROBE)}")
"""Names of what a run that was killed has left."""


class Publication(ABC):
    """Prepared data that is being written."""

    @abstractmethod
    def folder(self, run: str) -> Place:
        """Return where files of blocks go.

        Args:
            run: Digest of what the blocks are made of.
        """

    @abstractmethod
    def publish(self, manifest: DataManifest) -> None:
        """Write the manifest of the files that were written."""


@contextlib.contextmanager
def publishing(target: Place) -> Iterator[Publication]:
    """Give what to write prepared data to; where the block fails, nothing of it stays.

    Raises:
        StorageError: The target is taken, or its filesystem refuses.
    """
    if target.is_local:
        with atomic_directory(Path(target.name)) as tmp:
            yield _Directory(Place(target.filesystem, str(tmp.absolute()), target.name))
        return
    publication = _Prefix(target)
    try:
        publication.check_free()
        check_writable(target)
        try:
            yield publication
        except BaseException:
            publication.clear()
            raise
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{target.name} cannot be written: {reason(error)}") from error


class _Directory(Publication):
    """A directory of this machine, which gets its name when it is complete."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def folder(self, run: str) -> Place:
        return self._place

    def publish(self, manifest: DataManifest) -> None:
        text = manifest.to_text()
        Path(self._place.path, DATA_MANIFEST).write_text(text, encoding="utf-8")


class _Prefix(Publication):
    """A prefix in an object store, where nothing can be renamed: the manifest is written last.

    Files go below a name that what they are made of decides. So a run that is started once more
    overwrites what a killed one left, or what one at the same time writes, with the very same; and
    one of other data leaves it alone.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._manifest = place.below(DATA_MANIFEST)
        self._folder: Place | None = None
        self._prefix = ""

    def check_free(self) -> None:
        if self._manifest.is_file():
            raise StorageError(f"{self._place.name} holds prepared data; choose another --out")
        # A manifest among the files of a model would hide them.
        foreign = [name for name in entries_of(self._place) if not _OWN.fullmatch(name)]
        if foreign:
            raise StorageError(
                f"{self._place.name} exists and is not empty: it holds {min(foreign)!r}; choose "
                "another --out"
            )

    def folder(self, run: str) -> Place:
        self._prefix = run[:8]
        self._folder = self._place.below(self._prefix)
        make_directory(self._folder)
        return self._folder

    def publish(self, manifest: DataManifest) -> None:
        if self._is_published():
            return  # by another that made the very same
        self.check_free()
        for file in manifest.files:
            place = self._place.below(f"{self._prefix}/{file.name}")
            if not place.is_file() or place.size() != file.num_bytes:
                raise StorageError(
                    f"{place.name} was changed meanwhile, by another 'offsite-ray prepare' to the "
                    "same --out perhaps; run it again"
                )
        text = manifest.below(self._prefix).to_text()
        write_small(self._manifest, text.encode("utf-8"))

    def clear(self) -> None:
        """Remove what was written, as far as the store can be reached."""
        if self._folder is not None:
            with contextlib.suppress(OSError, pa.ArrowException):
                if not self._is_published():
                    self._folder.filesystem.delete_dir(self._folder.path)

    def _is_published(self) -> bool:
        """Return whether there is a manifest, and of the files in the folder of this run."""
        if not self._manifest.is_file():
            return False
        with self._manifest.filesystem.open_input_stream(self._manifest.path) as file:
            return f'"{self._prefix}/'.encode() in file.read()
