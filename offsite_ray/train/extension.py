# SPDX-License-Identifier: Apache-2.0
"""The C++ extension by which DeepSpeed's workers on CPUs talk, compiled on its first use."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

from offsite_ray.errors import TrainingError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator


def build_extension() -> None:
    """Compile it, if it is not there, and load it; DeepSpeed finds it loaded.

    Raises:
        TrainingError: It cannot be compiled.
    """
    from deepspeed.comm.torch import build_shm_op
    from torch.utils.cpp_extension import _get_build_directory

    directory = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
    with _locked(directory):
        # Torch waits for this file to go, without end. Who holds the lock knows that it is left
        # by a process that was killed.
        (directory / "lock").unlink(missing_ok=True)
        try:
            build_shm_op()
        except Exception as error:  # of torch, of a compiler, of what was compiled
            raise TrainingError(
                f"DeepSpeed's extension cannot be compiled: {first_line(error)}; install a C++ "
                "compiler (g++) and ninja on every node"
            ) from error


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
