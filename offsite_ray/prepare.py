# SPDX-License-Identifier: Apache-2.0
"""Preparing text on Ray Data: the same parts, written by many workers.

What streams through the cluster is only which part to write and what became of it. Text and blocks
go from the source through one worker to the target, so a corpus needs to fit in no one's memory.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from offsite_ray import errors
from offsite_ray.cluster import check_room, embedded_ray
from offsite_ray.data import PartWriter, WrittenPart
from offsite_ray.errors import ClusterError
from offsite_ray.results import to_plain

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

_MAX_ATTEMPTS = 4
"""At a part whose workers are lost. Ray Data itself would never end where a part kills them all."""


def write_on_ray(writer: PartWriter, num_workers: int) -> Generator[WrittenPart, None, None]:
    """Write every part on Ray Data workers, in the cluster at hand or in one of this process.

    Every worker must see the sources and the target.

    Args:
        writer: What writes a part.
        num_workers: Parts that are written at the same time, each on a CPU of its own.

    Yields:
        The parts as they are done, in any order.

    Raises:
        ConfigError: The cluster cannot hold the workers.
        OffsiteError: What a worker raised; the same as in this process.
        ClusterError: Workers were lost, or failed without one of these.
    """
    from ray.exceptions import RayError

    with embedded_ray(num_workers):
        check_room(num_workers, gpu=False)
        with _quiet_ray_data(), contextlib.closing(_rows(writer, num_workers)) as rows:
            try:
                for row in rows:
                    yield _result(row)
            except RayError as error:
                # The page that Ray makes of an error ends with the error.
                last = str(error).strip().splitlines()[-1][:500]
                raise ClusterError(f"preparing on Ray failed: {last}") from error


class Attempts:
    """Counts how often each part was begun, as no worker can that was lost over it."""

    def __init__(self) -> None:
        """Begin with none."""
        self._begun: Counter[int] = Counter()

    def begin(self, index: int) -> int:
        """Count an attempt at a part, and return how many there were."""
        self._begun[index] += 1
        return self._begun[index]


def _rows(writer: PartWriter, num_workers: int) -> Generator[dict[str, str], None, None]:
    """Yield what :func:`_write_part` returns for each part."""
    import ray
    from ray.data import DataContext, TaskPoolStrategy, from_items

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    reference = ray.put(writer)
    attempts = (
        ray.remote(Attempts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
    )
    num_parts = len(writer.parts)
    items = [{"index": index} for index in range(num_parts)]
    with DataContext.current(context):
        parts = from_items(items, override_num_blocks=num_parts).map(
            lambda row: _write_part(reference, attempts, int(row["index"])),
            compute=TaskPoolStrategy(size=min(num_workers, num_parts)),
            num_cpus=1,
        )
        # A generator, though typed as an iterator: closed, it stops the workers at once.
        rows: Any = iter(parts.iter_rows())
        with contextlib.closing(rows):
            yield from rows


def _write_part(reference: Any, attempts: Any, index: int) -> dict[str, str]:
    """Write a part on a worker; what it raises is a value too, for Ray makes pages out of it."""
    import ray

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        writer = _fetched(reference)
        if ray.get(attempts.begin.remote(index)) > _MAX_ATTEMPTS:
            raise ClusterError(
                f"{_MAX_ATTEMPTS} workers died over {writer.parts[index][0].name}, out of memory "
                "or killed; lower --num-workers, or give them more memory"
            )
        done = writer(index)
    except Exception as error:
        return {"done": "", "error": str(error), "kind": type(error).__name__}
    return {"done": json.dumps(to_plain(done)), "error": "", "kind": ""}


@functools.lru_cache(maxsize=1)
def _fetched(reference: Any) -> PartWriter:
    """Return the writer, whose tokenizer a worker need not unpack for each part."""
    import ray

    writer: PartWriter = ray.get(reference)
    return writer


def _result(row: dict[str, str]) -> WrittenPart:
    if not row["kind"]:
        return WrittenPart.from_plain(json.loads(row["done"]))
    known = getattr(errors, row["kind"], None)
    if known is None:
        raise ClusterError(f"preparing on Ray failed: {row['kind']}: {row['error']}")
    raise known(row["error"])


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Keep Ray Data's news from the terminal; its log files have them."""
    import ray.data  # noqa: F401  # sets up its log

    handlers = [
        handler
        for handler in logging.getLogger("ray.data").handlers
        if isinstance(handler, logging.StreamHandler)
    ]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)
