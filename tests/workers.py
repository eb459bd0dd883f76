# SPDX-License-Identifier: Apache-2.0
"""Two workers as threads of this process: what they agree on, without Ray's start-up."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from offsite_ray.training import TorchEngine, training_loop
from offsite_ray.training.engine import optimizer_fragments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from offsite_ray.config import TrainingConfig
    from offsite_ray.results import Report
    from offsite_ray.training import TrainingTask
    from offsite_ray.training.fragments import Fragment

WORLD_SIZE = 2


class Meeting:
    """Where the workers add what each of them brings."""

    def __init__(self) -> None:
        self._brought: list[Any] = [None] * WORLD_SIZE
        self._barrier = threading.Barrier(WORLD_SIZE, timeout=60)

    def sums(self, rank: int, values: Sequence[Any]) -> list[Any]:
        self._brought[rank] = list(values)
        self._barrier.wait()
        found = [sum(each) for each in zip(*self._brought, strict=True)]
        self._barrier.wait()
        return found


class Worker(TorchEngine):
    """One of two workers that hold everything, and share the writing."""

    world_size = WORLD_SIZE

    def __init__(
        self, task: TrainingTask, config: TrainingConfig, rank: int, meeting: Meeting
    ) -> None:
        super().__init__(task, config)
        self.rank, self._meeting = rank, meeting

    def step(self, learning_rate: float) -> float:
        parameters = list(self.trained.values())
        grads = [parameter.grad for parameter in parameters]
        for parameter, grad in zip(parameters, self._meeting.sums(self.rank, grads), strict=True):
            parameter.grad = grad
        return super().step(learning_rate)

    def reduce(self, values: Sequence[float]) -> list[float]:
        return self._meeting.sums(self.rank, values)

    def fragments(self) -> list[Fragment]:
        own = dict(list(self.trained.items())[self.rank :: self.world_size])
        return optimizer_fragments(own, self._optimizer)


def run_two(
    task: TrainingTask,
    config: TrainingConfig,
    run_dirs: Sequence[Path],
    reports: Sequence[Report],
) -> list[Any]:
    """Return what each worker's loop returned or raised."""
    meeting = Meeting()
    engines = [Worker(task, config, rank, meeting) for rank in range(WORLD_SIZE)]

    def work(rank: int) -> Any:
        return training_loop(task, engines[rank], config, run_dirs[rank], reports[rank])

    found: list[Any] = [None] * WORLD_SIZE
    threads = [
        threading.Thread(target=_keep, args=(found, rank, work), name=f"worker {rank}")
        for rank in range(WORLD_SIZE)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _keep(found: list[Any], rank: int, work: Callable[[int], Any]) -> None:
    try:
        found[rank] = work(rank)
    except Exception as error:
        found[rank] = error
