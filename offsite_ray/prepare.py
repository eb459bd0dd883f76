# SPDX-License-Identifier: Apache-2.0
"""Preparing text on Ray Data: the same parts, written by many workers.

Text and blocks go from the source through one worker to the target, so a corpus needs to fit in no
one's memory.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

from offsite_ray.cluster import attempt, check_room, count_attempts, done_parts, embedded_ray
from offsite_ray.data import PartWriter, WrittenPart

if TYPE_CHECKING:
    from collections.abc import Generator


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
    import ray
    from ray.data import TaskPoolStrategy

    with embedded_ray(num_workers):
        check_room(num_workers, gpu=False)
        reference = ray.put(writer)
        attempts = count_attempts()
        names = {part: sources[0].name for part, sources in enumerate(writer.parts)}
        parts = done_parts(
            "preparing",
            names,
            lambda row: attempt(row, attempts, lambda part: _fetched(reference)(part)),
            compute=TaskPoolStrategy(size=min(num_workers, len(names))),
            num_cpus=1,
        )
        with contextlib.closing(parts):
            yield from map(WrittenPart.from_plain, parts)


@functools.lru_cache(maxsize=1)
def _fetched(reference: Any) -> PartWriter:
    """Return the writer, whose tokenizer a worker need not unpack for each part."""
    import ray

    writer: PartWriter = ray.get(reference)
    return writer
