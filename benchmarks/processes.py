# SPDX-License-Identifier: Apache-2.0
"""A process, its time and its peak of memory; files in the page cache, or not.

Nothing heavy is imported here: Linux counts what the parent holds towards the peak of its child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.machine import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_READ_BYTES = 2**20

_LIST_IMPORTS = """
import json, sys
from offsite_ray.cli import main
assert main(sys.argv[1:]) == 0
print(json.dumps(sorted(sys.modules)))
"""

_IMPORT = """
import contextlib, importlib, json, os, sys
os.dup2(2, 1)
for name in json.load(sys.stdin):
    with contextlib.suppress(Exception):
        importlib.import_module(name)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """What a process took."""

    seconds: float
    """From its start to its end."""
    cpu_seconds: float
    """Of all its threads, in its own code and in the kernel's for it."""
    peak_bytes: int
    """Most that it had resident, files that it mapped among it."""
    disk_bytes: int
    """Read from the disk, since they were not in the page cache."""


def ran(command: Sequence[str], given: str = "") -> Ran:
    """Run a command from the repository's root, and measure it.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        process.stdin.write(given)
        process.stdin.close()
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Ran(
        seconds=seconds,
        cpu_seconds=used.ru_utime + used.ru_stime,
        peak_bytes=used.ru_maxrss * 1024,
        disk_bytes=used.ru_inblock * 512,
    )


def verb(*words: str) -> list[str]:
    """Return the command that runs a verb."""
    return [sys.executable, "-m", "offsite_ray", *words]


def imports_of(*words: str) -> Ran:
    """Return what an interpreter takes that imports what a verb imports, and does nothing else."""
    command = [sys.executable, "-c", _LIST_IMPORTS, *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    names = done.stdout.rstrip().rpartition("\n")[2]
    assert "torch" in json.loads(names)
    return ran([sys.executable, "-c", _IMPORT], names)


def cache(files: Iterable[Path]) -> None:
    """Read files, so that the next one to read them need not wait for the disk."""
    buffer = bytearray(_READ_BYTES)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def uncache(files: Iterable[Path]) -> None:
    """Write to the disk what is yet to be written of files, and keep nothing of them in memory."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
