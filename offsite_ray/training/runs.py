# SPDX-License-Identifier: Apache-2.0
"""Where a run keeps its data and checkpoints until its result is written."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING

from offsite_ray.bundle import locked, made_parent, storage_errors
from offsite_ray.errors import StorageError
from offsite_ray.storage import check_untaken, fetched, is_published, own_folder, store_of
from offsite_ray.training.mirror import Mirror
from offsite_ray.uris import shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path


def check_out(out: str | Path, resume: bool) -> None:
    """Refuse a path or a URI that is taken, before any work is done for it.

    Raises:
        StorageError: It is; where it holds the result of the run that is to go on, nothing else of
            that run stays.
    """
    if resume and is_published(out):
        run_dir, mirror = _run_dir(out), Mirror.beside(str(out))
        if run_dir.is_dir():
            with _alone(run_dir, out):
                shutil.rmtree(run_dir, ignore_errors=True)
        if mirror is not None:
            mirror.clear()
        raise StorageError(
            f"{shown(str(out))} is finished, so there is nothing to resume; choose another --out, "
            "or remove it to run anew"
        )
    check_untaken(out)


def _run_dir(out: str | Path) -> Path:
    store = store_of(out)
    if store is not None:
        return own_folder("runs", store, str(out))
    path = fetched(out)
    return path.parent / f".{path.name}.run"


@contextlib.contextmanager
def run_directory(out: str | Path, resume: bool) -> Iterator[Path]:
    """Yield where a run keeps its data and checkpoints: beside its result, or in the user's cache.

    Of a result that goes to a URI, the checkpoints are beside it too, and come from there where
    this machine does not have them. Removed on success, and where a run fails before its first
    checkpoint.

    Raises:
        StorageError: One is left by a run that was stopped, and ``resume`` is not asked for; or
            another run is at work in it.
    """
    run_dir, mirror = _run_dir(out), Mirror.beside(str(out))
    with made_parent(run_dir):
        with storage_errors(run_dir):
            run_dir.mkdir(mode=0o700, exist_ok=True)  # the text lies in it, in tokens
        with _alone(run_dir, out):
            left = _left_by_stopped(run_dir, mirror)
            if left is not None and not resume:
                raise StorageError(
                    f"{left} is left by a run that was stopped; go on with --resume, or remove it "
                    "to start anew"
                )
            if not _here(run_dir):
                # Nothing says by which settings the data in it was made.
                _empty(run_dir)
            try:
                if mirror is not None:
                    mirror.begin()
                    with storage_errors(run_dir):
                        mirror.bring(run_dir)
                yield run_dir
            except BaseException:
                if not _here(run_dir):
                    _remove(run_dir, mirror if left is None else None)
                raise
            _remove(run_dir, mirror)


def _here(run_dir: Path) -> bool:
    return any(run_dir.glob("checkpoint-*"))


def _left_by_stopped(run_dir: Path, mirror: Mirror | None) -> str | None:
    """Return where checkpoints are, if there are any."""
    if _here(run_dir):
        return str(run_dir)
    return mirror.place.name if mirror is not None and mirror.names() else None


def _remove(run_dir: Path, mirror: Mirror | None) -> None:
    shutil.rmtree(run_dir, ignore_errors=True)
    if mirror is not None:
        mirror.clear()


def _alone(run_dir: Path, out: str | Path) -> AbstractContextManager[int]:
    """Hold a lock on a directory, which goes with the process however it ends."""
    name = shown(str(out))
    busy = f"another run is writing {name}; wait for its end, or choose another --out"
    return locked(run_dir, os.open(run_dir, os.O_RDONLY), busy)


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
