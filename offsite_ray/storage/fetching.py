# SPDX-License-Identifier: Apache-2.0
"""Artefacts at URIs, brought to this machine once and verified on the way."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from offsite_ray.architectures import model_directory
from offsite_ray.bundle.atomic import atomic_directory, storage_errors
from offsite_ray.bundle.digest import digest_bytes, digest_plain
from offsite_ray.bundle.locks import alone
from offsite_ray.bundle.remembered import user_cache
from offsite_ray.errors import IntegrityError, StorageError
from offsite_ray.storage.listing import list_artefact
from offsite_ray.storage.places import place_of
from offsite_ray.storage.transfer import download, in_parallel
from offsite_ray.uris import is_uri

if TYPE_CHECKING:
    from collections.abc import Collection

    from offsite_ray.storage.listing import Listing
    from offsite_ray.storage.places import Place

_held: dict[Path, int] = {}
"""Copies that this process reads, and the descriptors by which it holds them."""
_IN_USE = ".in-use"
"""File beside a copy by which it is held: between nodes, NFS locks files and no directories."""


def fetched(name: str | Path, only: Collection[str] = ()) -> Path:
    """Return where something is on this machine; what lies at a URI is brought here first.

    A node brings it once, and again only if it was changed there: to the user's cache, whole or not
    at all, each file checked against its digest. A copy stays as long as a process uses it.

    Args:
        name: A path, which is returned as it is, or a URI.
        only: Names of the files that are wanted; by default all.

    Raises:
        StorageError: There is nothing at the URI, or the store or this disk refuses.
        IntegrityError: A file is missing there, or was altered.
    """
    store = store_of(name)
    if store is None:
        return Path(place_of(str(name)).path) if is_uri(name) else Path(name)
    folder = own_folder("artefacts", store, str(name), *sorted(only))
    with alone(folder / "lock"):
        listing = list_artefact(store, only)
        copy = folder / _state(listing) / _last_part(store)
        if not copy.is_dir():
            _bring(listing, copy)
            if _state(list_artefact(store, only)) != copy.parent.name:
                shutil.rmtree(copy.parent, ignore_errors=True)
                raise StorageError(f"{store.name} was changed while it was read; try again")
        _hold(copy)
        _forget_others(folder, copy)
    return copy


def model_at(name: str | Path, files: Collection[str] = ()) -> Path:
    """Return the directory of a model: a local one, at a URI, or a snapshot of the hub.

    Args:
        name: A directory, a URI, or the name of a repository.
        files: What is wanted of it; by default all that a model may have.

    Raises:
        StorageError: There is none.
    """
    if is_uri(name):
        return fetched(name, files)
    return model_directory(name, sorted(files)) if files else model_directory(name)


def found_by_all(name: str | Path, path: Path) -> str:
    """Return by what every node finds an artefact: its URI, or the path of what is on disk.

    Args:
        name: As it was given.
        path: What :func:`fetched` made of it.
    """
    return str(path.resolve()) if store_of(name) is None else str(name)


def store_of(name: str | Path) -> Place | None:
    """Return the place that a URI names; None: it is a path, or a URI of this machine's files."""
    if not is_uri(name):
        return None
    place = place_of(str(name).rstrip("/"))
    return None if place.is_local else place


def own_folder(kind: str, store: Place, *names: str) -> Path:
    """Return the folder of the user's cache for something of a store.

    Raises:
        StorageError: There is no place for a cache.
    """
    cache = user_cache(kind)
    if cache is None:
        raise StorageError(
            f"{store.name} needs a folder of this machine, and the user has no home: set "
            "XDG_CACHE_HOME"
        )
    with storage_errors(cache):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Two servers may have one path for two things; who asks makes no other thing of one.
    given = [re.sub(r"(?<=://)[^/]*@|/+(?=\?|$)", "", name) for name in names]
    return cache / digest_plain([store.path.rstrip("/"), *given])[:24]


def _last_part(store: Place) -> str:
    return store.path.rstrip("/").rpartition("/")[2] or "root"


def _state(listing: Listing) -> str:
    """Return what changes when anything there does."""
    manifests = {name: digest_bytes(content) for name, content in listing.manifests.items()}
    return digest_plain(
        [manifests, dict(listing.sizes), dict(listing.times), dict(listing.digests)]
    )[:24]


def _bring(listing: Listing, copy: Path) -> None:
    def bring(name: str) -> None:
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        found = download(listing.place.below(name), tmp / name, listing.sizes[name])
        if listing.digests.get(name, found) != found:
            raise IntegrityError(
                f"{listing.place.below(name).name} was altered: its digest is not the one in "
                f"{listing.told_by}"
            )

    with atomic_directory(copy) as tmp:
        in_parallel(bring, listing.sizes)
        for name, content in listing.manifests.items():
            (tmp / name).write_bytes(content)


def _hold(copy: Path) -> None:
    """Keep a copy from being removed as long as this process lives."""
    if copy not in _held:
        with storage_errors(copy):
            _held[copy] = os.open(copy.with_name(_IN_USE), os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.suppress(OSError):  # no locks on this file system
            fcntl.flock(_held[copy], fcntl.LOCK_SH | fcntl.LOCK_NB)


def _forget_others(folder: Path, copy: Path) -> None:
    """Remove copies of what was there before, unless somebody uses them."""
    for other in folder.iterdir():
        if other == copy.parent or not other.is_dir():
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(other / _IN_USE, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other)
            finally:
                os.close(descriptor)
