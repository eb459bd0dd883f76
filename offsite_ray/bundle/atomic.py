# SPDX-License-Identifier: Apache-2.0
"""Writing so that a killed process leaves nothing half done under the final name."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import secrets
import shutil
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def check_free(out: Path) -> None:
    """Refuse a path that is taken, before any work is done for it.

    Raises:
        StorageError: Something non-empty is there, or nothing can be written beside it.
    """
    if out.is_symlink() or out.name in ("", "..") or os.path.ismount(out):
        raise StorageError(
            f"{str(out)!r} is a link, a mount point or a folder without a name of its own, and "
            "cannot be replaced by what is written; give a new name inside it"
        )
    if out.is_dir():
        if any(out.iterdir()):
            raise StorageError(f"{out} exists and is not empty; choose another --out or remove it")
    elif out.exists():
        raise StorageError(f"{out} is in the way; choose another --out or remove it")
    check_parent(out)


def check_parent(out: Path) -> None:
    """Refuse a path below something that is no directory, or that may not be written to.

    Raises:
        StorageError: It is.
    """
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    if not folder.is_dir():
        raise StorageError(f"{folder} is no directory, so {out} cannot be written")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{folder} may not be written to, so {out} cannot be; choose another")


@contextlib.contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``out`` that takes its name when the block ends well.

    On any exception, an interrupt among them, the sibling is removed.

    Raises:
        StorageError: ``out`` is taken, or the file system refuses (no space, no permission).
    """
    check_free(out)
    with storage_errors(out, nothing_left=True), sibling_directory(out) as tmp:
        yield tmp
        _sync_tree(tmp)
        check_free(out)  # another may have written it meanwhile
        if out.is_dir():
            out.rmdir()
        tmp.rename(out)
        sync(out.parent)


@contextlib.contextmanager
def sibling_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``out``, which goes with the block.

    That of a process which was killed goes when the next one asks for a sibling of ``out``.

    Raises:
        OSError: The file system refuses; what it says, for the caller to put in words.
    """
    with made_parent(out), _locked_sibling(out) as tmp:
        try:
            yield tmp
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of the file ``out`` that replaces it when the block ends well.

    Raises:
        StorageError: The file system refuses.
    """
    with storage_errors(out, nothing_left=True), made_parent(out), replaced_file(out) as tmp:
        yield tmp


@contextlib.contextmanager
def replaced_file(out: Path) -> Iterator[Path]:
    """Do what :func:`atomic_file` does, in a folder that is there.

    Raises:
        OSError: The file system refuses; what it says, for the caller to put in words.
    """
    tmp = _sibling(out)
    try:
        yield tmp
        sync(tmp)
        tmp.replace(out)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(out: Path, plain: Any) -> None:
    """Write a file of JSON, whole or not at all; numbers that are none are not JSON."""
    with atomic_file(out) as tmp:
        tmp.write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def made_parent(out: Path) -> Iterator[None]:
    """Make the missing folders above ``out``; where the block fails, none of them stays.

    Raises:
        StorageError: The file system refuses.
    """
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        with storage_errors(out, nothing_left=True):
            out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # not made, or no longer empty
                folder.rmdir()
        raise


@contextlib.contextmanager
def storage_errors(path: Path, *, nothing_left: bool = False) -> Iterator[None]:
    """Turn what the operating system refuses into :class:`StorageError`, one line.

    Args:
        path: What is read or written, where the operating system does not name it.
        nothing_left: Whether nothing stays there of what was begun.
    """
    try:
        yield
    except OSError as error:
        said = f"{error.filename or path}: {error.strerror or error}"
        left = f"; nothing was left at {path}" if nothing_left else ""
        raise StorageError(said + left) from error


@contextlib.contextmanager
def _locked_sibling(out: Path) -> Iterator[Path]:
    """Make a temporary directory beside ``out`` that is locked as long as its process lives."""
    for old in out.parent.glob(f".{glob.escape(out.name)}.tmp-*"):
        with contextlib.suppress(OSError), _lock(old):  # another's, who is at work
            shutil.rmtree(old, ignore_errors=True)
    tmp = _sibling(out)
    tmp.mkdir()
    with _lock(tmp):
        # Between the two, somebody may have taken it for one that was left.
        tmp.mkdir(exist_ok=True)
        yield tmp


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Lock a directory; raise :class:`OSError` where another process has."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _sibling(out: Path) -> Path:
    """Return a temporary name beside ``out`` that no other process uses."""
    return out.parent / f".{out.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            sync(path)
    sync(directory)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
