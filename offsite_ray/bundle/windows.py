# SPDX-License-Identifier: Apache-2.0
"""Files read a window at a time, so that one of any size takes little memory.

A window is mapped, not copied: its bytes go from the page cache straight into a digest or another
file. It counts as memory of the process until the last view of it is gone.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator

WINDOW_BYTES = 32 * 2**20
"""Large enough for all cores to share the digest of one, small enough for several at once."""


def windows(file: BinaryIO, begin: int, end: int) -> Iterator[memoryview]:
    """Yield the bytes of a file from ``begin`` to ``end``, to be read only, in order."""
    for start in range(begin, end, WINDOW_BYTES):
        stop = min(start + WINDOW_BYTES, end)
        # From a disk, this window comes in one go, and the next one while this one is used.
        ahead = min(2 * WINDOW_BYTES, end - start)
        os.posix_fadvise(file.fileno(), start, ahead, os.POSIX_FADV_WILLNEED)
        yield mapped(file, start, stop)


def mapped(file: BinaryIO, begin: int, end: int, access: int = mmap.ACCESS_READ) -> memoryview:
    """Return bytes of a file as they are on disk; with ``ACCESS_COPY``, changes stay in memory."""
    if begin == end:
        return memoryview(bytearray())
    slack = begin % mmap.ALLOCATIONGRANULARITY
    memory = mmap.mmap(file.fileno(), end - begin + slack, access=access, offset=begin - slack)
    return memoryview(memory)[slack:]
