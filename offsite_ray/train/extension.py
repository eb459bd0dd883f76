# SPDX-License-Identifier: Apache-2.0
"""The C++ extension by which DeepSpeed's workers on CPUs talk, compiled on its first use."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

from offsite_ray.errors import TrainingError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAME = "deepspeed_shm_comm"
_SECONDS_TO_START = 5.0
"""Most that torch takes from its lock to the start of a compiler."""


def build_extension() -> None:
    """Compile it, if it is not there, and load it; DeepSpeed finds it loaded.

    Raises:
        TrainingError: It cannot be compiled.
    """
    from deepspeed.comm.torch import build_shm_op

    directory = compiled_extension().parent
    with _locked(directory):
        _drop_left(directory / "lock")
        try:
            build_shm_op()
        except Exception as error:  # of torch, of a compiler, of what was compiled
            raise TrainingError(
                f"DeepSpeed's extension cannot be compiled: {first_line(error)}; install a C++ "
                "compiler (g++) and ninja on every node"
            ) from error


def compiled_extension() -> Path:
    """Return the file that it is compiled into; its directory is there then."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(_NAME, verbose=False)) / f"{_NAME}.so"


def missing_tools() -> tuple[str, ...]:
    """Return what is missing here of what compiles it."""
    compiler = os.environ.get("CXX", "c++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    there = {
        compiler: shutil.which(compiler) is not None,
        "ninja": shutil.which("ninja") is not None,
        str(header): header.is_file(),
    }
    return tuple(name for name, found in there.items() if not found)


def _drop_left(lock: Path) -> None:
    """Remove the file that torch waits for without end, if a process that was killed left it.

    Who compiles without our lock, another program with DeepSpeed, is waited for.
    """
    with contextlib.suppress(FileNotFoundError):
        while time.time() - lock.stat().st_mtime < _SECONDS_TO_START or _is_compiling(lock.parent):
            time.sleep(_SECONDS_TO_START / 10)
        lock.unlink()


def _is_compiling(directory: Path) -> bool:
    """Return whether a process of this machine works in a directory, as ninja does."""
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # gone, or another user's
            if cwd.readlink() == directory:
                return True
    return False


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a lock on a directory, which goes with the process however it ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
