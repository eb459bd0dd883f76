# SPDX-License-Identifier: Apache-2.0
"""Filling a teacher cache with a pool of Ray Data actors, each with the teacher in memory."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from offsite_ray.cluster import attempt, check_room, count_attempts, done_parts, embedded_ray
from offsite_ray.distillation.teacher import Teacher
from offsite_ray.train.run import devices_held, use_gpu, worker_env

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offsite_ray.config import DistillConfig
    from offsite_ray.distillation.cache import CacheTask
    from offsite_ray.results import Report


class TeacherActor:
    """Computes parts of a cache; Ray Data keeps it alive from part to part."""

    def __init__(self, task: CacheTask, attempts: Any, *, gpu: bool) -> None:
        """Load nothing yet: what fails here is not told, and tried again for ever."""
        self._task, self._attempts, self._gpu = task, attempts, gpu
        self._teacher: Teacher | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Write the part that a row names, with the teacher loaded first."""
        return attempt(row, self._attempts, self._write)

    def _write(self, part: int) -> int:
        self._teacher = self._teacher or Teacher(self._task, gpu=self._gpu)
        self._teacher.write(part)
        return part


def fill_on_ray(
    task: CacheTask,
    config: DistillConfig,
    parts: Sequence[int],
    tell: Callable[[int], None],
    report: Report = lambda _: None,
) -> None:
    """Write parts of a cache with ``config.num_workers`` actors.

    A lost actor's parts are computed again by another; the files are whole or not there. What the
    actors hold of the cluster is reported.

    Raises:
        ConfigError: The cluster cannot hold the actors.
        OffsiteError: What an actor raised; the same as in this process.
        ClusterError: Actors were lost, or failed without one of these.
    """
    with embedded_ray(config.num_workers):
        gpu = use_gpu(config)
        check_room(config.num_workers, gpu=gpu)
        num = min(config.num_workers, len(parts))
        done = done_parts(
            "filling the teacher cache",
            {part: task.file(part).name for part in parts},
            TeacherActor,
            fn_constructor_args=(task, count_attempts()),
            fn_constructor_kwargs={"gpu": gpu},
            concurrency=num,
            num_cpus=1,
            num_gpus=1 if gpu else 0,
            runtime_env={"env_vars": worker_env(config.num_workers, gpu=gpu)},
        )
        held = devices_held(report, num_gpus=num if gpu else 0, num_cpus=num)
        with held, contextlib.closing(done):
            for part in done:
                tell(part)
