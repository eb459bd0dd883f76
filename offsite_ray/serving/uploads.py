# SPDX-License-Identifier: Apache-2.0
"""Adapter bundles that are sent over the network: tar archives, written to disk part by part."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tarfile
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from offsite_ray.bundle import storage_errors
from offsite_ray.errors import BundleError, RequestError
from offsite_ray.results import bytes_text

if TYPE_CHECKING:
    from collections.abc import Iterator

_ABANDONED_S = 900.0
"""Seconds without a new part after which an upload is forgotten."""
_MAX_FILES = 256
"""Of an adapter bundle."""


class Uploads:
    """Archives that are on their way, in a directory of the registry's disk."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        """Begin with none; what another process left is removed.

        Args:
            root: Directory for them alone.
            max_bytes: Of an archive.
        """
        self.root, self._max_bytes = root, max_bytes
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        self._sizes: dict[str, int] = {}
        self._touched: dict[str, float] = {}
        self._claimed: set[str] = set()

    def begin(self) -> str:
        """Return by what the parts of a new archive are named."""
        for name, touched in list(self._touched.items()):
            if time.monotonic() - touched > _ABANDONED_S:
                self.forget(name)
        name = secrets.token_hex(8)
        self._sizes[name], self._touched[name] = 0, time.monotonic()
        return name

    def add(self, name: str, part: bytes) -> None:
        """Write the next part.

        Raises:
            RequestError: The archive is larger than allowed, or its upload was abandoned.
            StorageError: The disk is full.
        """
        if name not in self._sizes:
            raise RequestError("this upload took too long or was ended; send it again")
        self._sizes[name] += len(part)
        self._touched[name] = time.monotonic()
        if self._sizes[name] > self._max_bytes:
            raise RequestError(
                f"the archive has more than the {bytes_text(self._max_bytes)} that are allowed"
            )
        archive = self.root / f"{name}.tar"
        with storage_errors(archive), archive.open("ab") as file:
            file.write(part)

    @contextlib.contextmanager
    def unpacked(self, name: str) -> Iterator[Path]:
        """Give the directory that an archive holds; it and the archive are removed afterwards.

        Raises:
            BundleError: It is no tar archive of an adapter bundle.
            StorageError: The disk is full.
        """
        out = self.root / name
        self._claimed.add(name)
        try:
            _unpack(self.root / f"{name}.tar", out)
            yield out
        finally:
            self._claimed.remove(name)
            self.forget(name)

    def forget(self, name: str) -> None:
        """Remove what there is of an upload, unless it is just being looked at."""
        if name in self._claimed:
            return
        self._sizes.pop(name, None)
        self._touched.pop(name, None)
        (self.root / f"{name}.tar").unlink(missing_ok=True)
        shutil.rmtree(self.root / name, ignore_errors=True)


def _unpack(archive: Path, out: Path) -> None:
    """Write the files of an archive into one directory, whatever folder they have in it."""
    with storage_errors(archive):
        out.mkdir()
        try:
            # Not compressed: then what is unpacked has no more bytes than what was counted.
            with tarfile.open(archive, "r:") as tar:
                for member in tar:
                    if not member.isdir():
                        _unpack_file(tar, member, out)
        except tarfile.TarError as error:
            raise BundleError(
                f"that is no tar archive ({error}); send 'tar -C ADAPTER -c .', not compressed"
            ) from error


def _unpack_file(tar: tarfile.TarFile, member: tarfile.TarInfo, out: Path) -> None:
    path = PurePosixPath(member.name)
    inside = len(path.parts) <= 2 and ".." not in path.parts and not path.is_absolute()
    # What is sparse has more bytes on the disk than in the archive.
    if not inside or not member.isreg() or member.issparse():
        raise BundleError(
            f"the archive holds {member.name!r}; an adapter bundle has files in one directory"
        )
    if (out / path.name).exists() or len(list(out.iterdir())) >= _MAX_FILES:
        raise BundleError(f"the archive holds {path.name!r} twice, or too many files")
    source = tar.extractfile(member)
    assert source is not None
    with source, (out / path.name).open("xb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
