# SPDX-License-Identifier: Apache-2.0
"""Locks between processes that would make the same thing at the same time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING

from offsite_ray.bundle.atomic import storage_errors
from offsite_ray.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system answers that has no locks."""


@contextlib.contextmanager
def alone(lock: Path, *, busy: str | None = None) -> Iterator[None]:
    """Hold a lock, which goes with the process however it ends.

    Args:
        lock: File to hold it by; it stays, and names the process that held it last.
        busy: What to say where someone else holds it; None: wait for them.

    Raises:
        StorageError: Someone else holds it, and waiting is not wanted; or it cannot be made.
    """
    with storage_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    with locked(lock, descriptor, busy):
        with storage_errors(lock):
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield


@contextlib.contextmanager
def locked(path: Path, descriptor: int, busy: str | None) -> Iterator[int]:
    """Hold a lock by what is open, a file or a directory, and close it; see :func:`alone`."""
    try:
        with storage_errors(path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise StorageError(busy) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
        yield descriptor
    finally:
        os.close(descriptor)
