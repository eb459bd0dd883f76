# SPDX-License-Identifier: Apache-2.0
"""Filling a teacher cache with a pool of Ray Data actors, each with the teacher in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offsite_ray.cluster import check_room, embedded_ray
from offsite_ray.distillation.teacher import Teacher
from offsite_ray.train.run import use_gpu, worker_env

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offsite_ray.config import DistillConfig
    from offsite_ray.distillation.cache import CacheTask


class TeacherActor:
    """Computes parts of a cache; Ray Data keeps it alive from part to part."""

    def __init__(self, task: CacheTask, *, gpu: bool) -> None:
        """Load the teacher."""
        self._teacher = Teacher(task, gpu=gpu)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write the part that a row names; return the row."""
        self._teacher.write(int(row["part"]))
        return row


def fill_on_ray(
    task: CacheTask, config: DistillConfig, parts: Sequence[int], tell: Callable[[int], None]
) -> None:
    """Write parts of a cache with ``config.num_workers`` actors.

    A lost actor's parts are computed again by another; the files are whole or not there.
    """
    import ray

    with embedded_ray(config.num_workers):
        gpu = use_gpu(config)
        check_room(config.num_workers, gpu=gpu)
        rows = ray.data.from_items([{"part": part} for part in parts])
        done = rows.repartition(len(parts)).map(
            TeacherActor,  # type: ignore[arg-type]  # a class is constructed on each actor
            fn_constructor_args=(task,),
            fn_constructor_kwargs={"gpu": gpu},
            concurrency=min(config.num_workers, len(parts)),
            num_cpus=1,
            num_gpus=1 if gpu else 0,
            runtime_env={"env_vars": worker_env(config.num_workers, gpu=gpu)},
        )
        for row in done.iter_rows():
            tell(int(row["part"]))
