# SPDX-License-Identifier: Apache-2.0
"""Disks that are soon full."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Give a folder a disk of some bytes; where none can be mounted, no file may be larger."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        try:
            yield
        finally:
            # Lazily: a worker of Ray that ends just now may still stand in it.
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    with no_file_larger_than(size):
        yield


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Let this process write no file of more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
