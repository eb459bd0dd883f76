# SPDX-License-Identifier: Apache-2.0
"""One preparing of a text, or one reading of prepared data, measured in a process of its own.

    python -m benchmarks.prepare_run '{"sources": ...}'     a Job as JSON; prints a Run as JSON

What runs is the library's own. A small text goes first, so that imports and the start of Ray are
not counted as work; they are told apart.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from offsite_ray.cluster import embedded_ray
from offsite_ray.data import open_prepared, parts, split_blocks, write_blocks, write_here
from offsite_ray.prepare import write_on_ray
from offsite_ray.results import to_plain

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCKS_READ = 2000
_ANY_VOCABULARY = 2**31
_SMALL_PART_BYTES = 2**16
"""Of the small text, so that each worker gets some of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to measure."""

    source: str
    small_source: str
    """What is prepared first."""
    tokenizer: str
    block_size: int
    num_workers: int
    """0: in this process, without Ray."""
    out: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one process measured."""

    start_seconds: float
    """From the start of the process to the end of the small text."""
    seconds: float
    cpu_seconds: float
    """Of this process and its children, Ray's own among them, meanwhile."""
    num_tokens: int
    digest: str
    process_bytes: int
    """Most that this process had resident, before it read anything of what it wrote."""
    worker_bytes: tuple[int, ...]
    """The same of each worker."""
    open_seconds: float
    """Opening what was written, every digest verified."""
    read_seconds: float
    """Reading a block, drawn at random."""
    read_bytes: int
    """Most that this process had resident at the end of it all."""
    load: tuple[float, float, float]
    """Load of the machine over 1, 5 and 15 minutes before the start, from /proc/loadavg."""


def measure(job: Job) -> Run:
    """Prepare, then read, and say what it took."""
    load = tuple(map(float, Path("/proc/loadavg").read_text("ascii").split()[:3]))
    with _workers(job.num_workers) as write_parts:
        prepare = functools.partial(
            write_blocks,
            tokenizer_dir=job.tokenizer,
            block_size=job.block_size,
            write_parts=write_parts,
        )
        usual, parts._PART_BYTES = parts._PART_BYTES, _SMALL_PART_BYTES
        prepare([job.small_source], out=f"{job.out}-small")
        parts._PART_BYTES = usual
        start_seconds = time.time() - psutil.Process().create_time()
        start, used = time.perf_counter(), _cpu_seconds()
        result = prepare([job.source], out=job.out)
        seconds, used = time.perf_counter() - start, _cpu_seconds() - used
        process_bytes, worker_bytes = _peak(psutil.Process()), _worker_peaks(job.num_workers)
    opened, read = _read(job)
    # Linux counts pages in batches, and may give a little less than it gave before.
    read_bytes = max(process_bytes, _peak(psutil.Process()))
    return Run(
        start_seconds=start_seconds,
        seconds=seconds,
        cpu_seconds=used,
        num_tokens=result.num_tokens,
        digest=result.digest,
        process_bytes=process_bytes,
        worker_bytes=worker_bytes,
        open_seconds=opened,
        read_seconds=read,
        read_bytes=read_bytes,
        load=(load[0], load[1], load[2]),
    )


@contextlib.contextmanager
def _workers(num_workers: int) -> Iterator[Any]:
    if num_workers == 0:
        yield write_here
        return
    with embedded_ray(num_workers):
        yield functools.partial(write_on_ray, num_workers=num_workers)


def _read(job: Job) -> tuple[float, float]:
    """Return the seconds of opening prepared data, and of reading one of its blocks."""
    start = time.perf_counter()
    data = open_prepared(job.out, job.tokenizer, _ANY_VOCABULARY)
    opened = time.perf_counter() - start
    train, _ = split_blocks(data.path, 0.02, 0)
    rows = np.random.default_rng(0).integers(0, len(train), _BLOCKS_READ)
    start = time.perf_counter()
    for row in rows:
        train[int(row)]
    return opened, (time.perf_counter() - start) / _BLOCKS_READ


def _cpu_seconds() -> float:
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return float(sum(spent.user + spent.system for spent in times))


def _worker_peaks(num_workers: int) -> tuple[int, ...]:
    """Return the peaks of the processes that worked; Ray has others, which are all smaller."""
    processes = psutil.Process().children(recursive=True)
    workers = [process for process in processes if process.name().startswith("ray::")]
    return tuple(sorted(map(_peak, workers), reverse=True)[:num_workers])


def _peak(process: psutil.Process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text("utf-8").splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    print(json.dumps(to_plain(measure(Job(**json.loads(sys.argv[1]))))))
