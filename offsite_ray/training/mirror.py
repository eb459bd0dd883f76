# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run whose result goes to a URI: kept there too, for when the machine is gone."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import IntegrityError, StorageError
from offsite_ray.storage import store_of
from offsite_ray.storage.transfer import (
    download,
    entries_of,
    in_parallel,
    infos_of,
    make_directory,
    read_small,
    remove,
    retried,
    upload,
    write_small,
)
from offsite_ray.training.checkpoints import STATE

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_ray.storage import Place

_LOG = logging.getLogger(__name__)

_PREFIX = "checkpoint-"
_BEGUN = "begun"
"""File by which a run tries, before any work, whether it can write there."""
_STATE_BYTES = 2**30
"""Most that the records of a run may take."""


class Mirror:
    """The run's directory at a URI, beside its result.

    A checkpoint is there when its state is, which is written last and removed first.
    """

    def __init__(self, place: Place) -> None:
        """Take where it is."""
        self.place = place

    @classmethod
    def beside(cls, out: str | None) -> Mirror | None:
        """Return that of a result; None: it goes to this machine's files.

        Raises:
            StorageError: The URI names a whole bucket.
        """
        store = None if out is None else store_of(out)
        if store is None:
            return None
        name = store.path.rstrip("/").rpartition("/")[2]
        return cls(store.beside(f".{name}.run"))

    def begin(self) -> None:
        """Write to it; raise :class:`StorageError` where that cannot be."""
        make_directory(self.place)
        write_small(self.place.below(_BEGUN), b"")

    def names(self) -> list[str]:
        """Return the checkpoints there, in the order of their steps."""
        found = sorted(name for name in entries_of(self.place) if name.startswith(_PREFIX))
        states = infos_of([self.place.below(f"{name}/{STATE}") for name in found])
        return [name for name, info in zip(found, states, strict=True) if info.is_file]

    def put(self, checkpoint: Path) -> None:
        """Upload a checkpoint of this machine, and remove those that are here no more.

        A store that cannot be reached for a while costs no run: the next one will do.

        Raises:
            StorageError: It could not be written.
        """
        target = self.place.below(checkpoint.name)
        make_directory(target)
        files = [path for path in checkpoint.iterdir() if path.name != STATE]
        in_parallel(lambda path: upload(path, target.below(path.name)), files)
        upload(checkpoint / STATE, target.below(STATE))
        for name in self.names():
            if not (checkpoint.parent / name).is_dir():
                self.remove(name)

    def bring(self, run_dir: Path) -> None:
        """Download the checkpoints that this machine does not have.

        Raises:
            StorageError: The store or this machine's disk refuses.
            IntegrityError: One was altered.
        """
        for name in self.names():
            if not (run_dir / name).is_dir():
                self._bring(name, run_dir)

    def _bring(self, name: str, run_dir: Path) -> None:
        source, partial = self.place.below(name), run_dir / f"partial-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        content = read_small(source.below(STATE), _STATE_BYTES) or b""
        files = _files(source, content)
        infos = infos_of([source.below(file) for file in files])

        def bring(given: tuple[str, Any]) -> None:
            file, info = given
            found = None
            if info.is_file:
                found = download(source.below(file), partial / file, info.size)
            if found != files[file]:
                raise IntegrityError(
                    f"{source.below(file).name} is missing or was altered; remove {source.name}, "
                    "and --resume goes on from the one before, or from the beginning"
                )

        in_parallel(bring, zip(files, infos, strict=True))
        (partial / STATE).write_bytes(content)
        partial.rename(run_dir / name)

    def remove(self, name: str) -> None:
        """Remove a checkpoint, its state first; what cannot be removed stays, and does no harm."""
        folder = self.place.below(name)
        with contextlib.suppress(StorageError):
            remove(folder.below(STATE))
            retried(lambda: folder.filesystem.delete_dir(folder.path), folder, "removed")

    def clear(self) -> None:
        """Remove all of it; what cannot be removed stays, and is said."""
        try:
            for name in self.names():
                remove(self.place.below(name).below(STATE))
            retried(lambda: _delete(self.place), self.place, "removed")
        except StorageError as error:
            _LOG.warning("%s", error)


def _delete(place: Place) -> None:
    with contextlib.suppress(FileNotFoundError):
        place.filesystem.delete_dir(place.path)


def _files(place: Place, state: bytes) -> dict[str, str]:
    """Return the files of a checkpoint with their digests, as its state says."""
    try:
        found = {str(name): str(digest) for name, digest in json.loads(state)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{place.name} is damaged ({STATE}: {error!r}); remove it") from error
    if odd := [name for name in found if "/" in name or name.startswith(".")]:
        raise IntegrityError(f"{place.name} names the file {odd[0]!r}, which is not in it")
    return found
