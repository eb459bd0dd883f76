# SPDX-License-Identifier: Apache-2.0
"""Artefacts under their final name, a path or a URI: whole, or not at all.

A store renames nothing, so there a directory is an artefact by the file that is written last: its
manifest, or the config of a model without one. Before all others goes the list of what is about to
come, by which what a killed process left is known for what it is, and removed by the next one.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from offsite_ray.bundle.atomic import (
    atomic_directory,
    atomic_file,
    check_free,
    check_parent,
    sibling_directory,
    storage_errors,
)
from offsite_ray.bundle.digest import digest_file
from offsite_ray.bundle.manifest import MANIFEST
from offsite_ray.errors import StorageError
from offsite_ray.storage.fetching import fetched, own_folder, store_of
from offsite_ray.storage.listing import LAST, MOST_BYTES, UPLOAD, read_begun
from offsite_ray.storage.places import place_of
from offsite_ray.storage.transfer import (
    PROBE,
    check_writable,
    entries_of,
    in_parallel,
    make_directory,
    read_small,
    remove,
    retried,
    upload,
    write_small,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from offsite_ray.storage.places import Place


def is_published(out: str | Path) -> bool:
    """Return whether there is an artefact in a directory or at a URI, whole and with its last file.

    Of what an upload left that was ended before its end, it is none.
    """
    store = store_of(out)
    if store is None:
        return any((fetched(out) / name).is_file() for name in LAST)
    entries = entries_of(store)
    begun = read_begun(store) if UPLOAD in entries else None
    return any(name in entries for name in LAST) if begun is None else begun.is_done(entries)


def check_untaken(out: str | Path) -> None:
    """Refuse a path or a URI that is taken, before any work is done for it.

    Raises:
        StorageError: Something is there, or it cannot be written to.
    """
    store = store_of(out)
    if store is None:
        check_free(fetched(out))
    else:
        _left(store)
        check_writable(store)


def check_replaceable(out: str | Path) -> None:
    """Refuse what :func:`replaced` could not write, before any work is done for it.

    Raises:
        StorageError: It is a directory, or nothing can be written beside it.
    """
    place = place_of(str(out))
    if retried(place.is_directory, place):
        raise StorageError(f"--out {place.name} is a directory; give the name of a file")
    if place.is_local:
        check_parent(fetched(out))
    else:
        check_writable(place.beside(""))


def check_replaceable_files(out: str | Path) -> None:
    """Refuse what :func:`replaced_files` could not write, before any work is done for it.

    Raises:
        StorageError: It is a file, or nothing can be written there.
    """
    place = place_of(str(out))
    if retried(place.is_file, place):
        raise StorageError(f"--report {place.name} is no directory; give the name of one")
    if place.is_local:
        check_parent(fetched(out))
    else:
        check_writable(place)


@contextlib.contextmanager
def published(out: str | Path) -> Iterator[Path]:
    """Give an empty directory, which becomes the artefact ``out`` when the block ends well.

    Raises:
        StorageError: ``out`` is taken, or cannot be written; nothing is under its name then.
    """
    store = store_of(out)
    if store is None:
        with atomic_directory(fetched(out)) as tmp:
            yield tmp
        return
    _left(store)
    folder = own_folder("uploads", store, str(out))
    with storage_errors(folder), sibling_directory(folder) as tmp:
        yield tmp
        _publish(tmp, store)


@contextlib.contextmanager
def replaced(out: str | Path) -> Iterator[Path]:
    """Give a path of this machine to write a file to, which takes the place of the file ``out``.

    Raises:
        StorageError: It cannot be written.
    """
    store = store_of(out)
    if store is None:
        with atomic_file(fetched(out)) as tmp:
            yield tmp
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder, "file")
        upload(Path(folder, "file"), store)


@contextlib.contextmanager
def replaced_files(out: str | Path) -> Iterator[Path]:
    """Give a directory of this machine to write files to, which take the place of those in ``out``.

    Raises:
        StorageError: One cannot be written.
    """
    store = store_of(out)
    if store is None:
        yield fetched(out)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        for path in sorted(Path(folder).iterdir()):
            upload(path, store.below(path.name))


def _left(store: Place) -> list[str]:
    """Return the names of what an upload left that did not come to its end.

    Raises:
        StorageError: There is something else.
    """
    entries = entries_of(store)
    begun = read_begun(store) if UPLOAD in entries else None
    if begun is not None and begun.is_done(entries):
        raise StorageError(
            f"{store.name} exists and is not empty; choose another --out or remove it"
        )
    own = {PROBE, UPLOAD, *(begun.digests if begun is not None else ())}
    if foreign := sorted(set(entries) - own):
        raise StorageError(
            f"{store.name} exists and is not empty: it holds {foreign[0]!r}; choose another --out"
        )
    return sorted(entries)


def _check_alone(store: Place, plan: bytes) -> None:
    """Refuse to go on where another upload to the same name was begun meanwhile."""
    if read_small(store.below(UPLOAD), MOST_BYTES) != plan:
        raise StorageError(f"another process is writing to {store.name}; choose another --out")


def _publish(folder: Path, store: Place) -> None:
    names = sorted(path.name for path in folder.iterdir())
    last = next(name for name in LAST if name in names)
    digests = {name: digest_file(folder / name) for name in names}
    plan = json.dumps({"upload": secrets.token_hex(8), "last": last, "files": digests}).encode()
    for name in [name for name in _left(store) if name != UPLOAD]:
        remove(store.below(name))
    make_directory(store)
    write_small(store.below(UPLOAD), plan)
    in_parallel(
        lambda name: upload(folder / name, store.below(name)),
        [name for name in names if name != last],
    )
    _check_alone(store, plan)
    upload(folder / last, store.below(last))
    _check_alone(store, plan)
    if last == MANIFEST:  # which has the digests too
        remove(store.below(UPLOAD))
