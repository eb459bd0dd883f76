# SPDX-License-Identifier: Apache-2.0
"""The Ray cluster that work runs on: the one at hand, or one of this process for the time being."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def embedded_ray(num_workers: int) -> Iterator[None]:
    """Use the Ray cluster at hand, or run one in this process for the time being.

    A cluster is at hand where this process is connected to one, or ``RAY_ADDRESS`` names one.

    Args:
        num_workers: Workers of Ray Train or Ray Data that will run; 0: of neither.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    # A worker that only waits for its first step takes a core of Ray's count, not of the machine.
    local: dict[str, Any] = {
        "num_cpus": max(num_workers + 1, os.cpu_count() or 1),
        # The state of actors is known to the dashboard alone, and Ray Train cleans up by it. Where
        # there are no such workers, its dozen processes would only keep the first trial waiting.
        "include_dashboard": num_workers > 0,
    }
    address = os.environ.get("RAY_ADDRESS")
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **({} if address else local))
    try:
        yield
    finally:
        ray.shutdown()


def check_room(num_workers: int, *, gpu: bool) -> None:
    """Refuse a run that the cluster can never hold; raise :class:`ConfigError`."""
    import ray

    kind = "GPU" if gpu else "CPU"
    there = ray.cluster_resources().get(kind, 0)
    if there < num_workers:
        raise ConfigError(
            f"{num_workers} workers need {num_workers} {kind}s, and the Ray cluster has {there:g}; "
            "lower --num-workers or add nodes"
        )
