# SPDX-License-Identifier: Apache-2.0
"""Disks that are small or slow: files, mounted. It takes root."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_THROTTLE = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")
"""Of the whole machine, by device: writes from the page cache are nobody's, and count only here."""


def why_not() -> str | None:
    """Return why nothing can be mounted here; None where it can."""
    return None if os.geteuid() == 0 else "mounting a disk takes root"


def why_not_slow() -> str | None:
    """Return why no disk can be made slow here; None where one can."""
    if _THROTTLE.exists():
        return why_not()
    return f"a disk is made slow by the blkio controller (cgroup v1), and {_THROTTLE} is not there"


@contextlib.contextmanager
def disk(image: Path, size_bytes: int) -> Iterator[Path]:
    """Make a disk of some bytes (ext4, in a file) and mount it beside, until the block ends."""
    with image.open("wb") as file:
        file.truncate(size_bytes)
    # Nothing is left to be written later, beside what is written by a drill.
    eager = "lazy_itable_init=0,lazy_journal_init=0"
    _run("mkfs.ext4", "-q", "-m", "0", "-E", eager, str(image))
    with mounted(image) as folder:
        yield folder
    image.unlink()


@contextlib.contextmanager
def mounted(image: Path) -> Iterator[Path]:
    """Mount a disk until the block ends; return where."""
    folder = image.with_suffix("")
    folder.mkdir()
    _run("mount", "-o", "loop", str(image), str(folder))
    try:
        yield folder
    finally:
        # Lazily: a worker of Ray that ends just now may still stand in it.
        _run("umount", "-l", str(folder))
        folder.rmdir()


@contextlib.contextmanager
def throttled(folder: Path, bytes_per_s: int) -> Iterator[None]:
    """Let the disk that a folder is on write so many bytes a second, until the block ends."""
    number = folder.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    _THROTTLE.write_text(f"{device} {bytes_per_s}")
    try:
        yield
    finally:
        _THROTTLE.write_text(f"{device} 0")


def pulled_out(image: Path, copy: Path) -> None:
    """Copy what is on a disk now, as if its power was cut: without what is still in memory."""
    _run("cp", "--sparse=always", str(image), str(copy))


def fill(folder: Path) -> Path:
    """Write until a disk has no place for a byte more; return the file to remove."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return filler


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free on the disk of a folder."""
    return shutil.disk_usage(folder).free


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
