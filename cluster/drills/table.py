# SPDX-License-Identifier: Apache-2.0
"""The table of drills."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.drills import disks, distilling, serving, sweeping
from cluster.drills.lab import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.drills.lab import Lab, Outcome


def _nothing() -> str | None:
    return None


def _redis() -> str | None:
    there = shutil.which("redis-server")
    return None if there else "redis-server is not installed (apt install redis-server)"


ANYWHERE = Plan()


@dataclass(frozen=True, kw_only=True)
class Drill:
    """What is broken, and how it is judged whole."""

    name: str
    done: str
    """What is done."""
    whole: str
    """What must be so for it to be whole again."""
    run: Callable[[Lab], Outcome]
    plan: Plan = ANYWHERE
    why_not: Callable[[], str | None] = _nothing
    """Returns why it cannot be run on this machine, beside what the plan needs."""
    small_node_bytes: int | None = None
    """Size of the disk that the first worker has for Ray's files; None: no disk of its own."""


_TRAINS = "a step is done that was not done before"
_SERVES = "Serve has every replica at work, and a worker's proxy is healthy"
_SERVING = Plan(needs_network=True)

DRILLS = (
    Drill(
        name="distil, node killed",
        done="kill -9 of every process of one of two nodes that train; a third is idle",
        whole=_TRAINS,
        run=distilling.worker_killed,
    ),
    Drill(
        name="sweep, node killed",
        done="kill -9 of every process of one of three nodes with a trial each",
        whole="every trial that was at work there is at work again or done",
        run=sweeping.worker_killed,
    ),
    Drill(
        name="serve, node killed",
        done="kill -9 of every process of one of two nodes with an engine; a third is idle",
        whole=_SERVES,
        run=serving.worker_killed,
        plan=_SERVING,
    ),
    Drill(
        name="serve, head killed (Redis)",
        done="kill -9 of every process of the head, started again after 10 s; Redis has its state",
        whole=_SERVES,
        run=serving.head_killed,
        plan=Plan(needs_network=True, keeps="redis"),
        why_not=_redis,
    ),
    Drill(
        name="serve, head killed (RocksDB)",
        done="the same; Ray's embedded RocksDB (alpha in 2.60) has its state",
        whole=_SERVES,
        run=serving.head_killed,
        plan=Plan(needs_network=True, keeps="rocksdb"),
    ),
    Drill(
        name="distil, node cut off",
        done="the cable of one of two nodes that train is pulled for 20 s",
        whole=f"{_TRAINS}, counted from when the cable is back",
        run=distilling.cut_off,
        plan=_SERVING,
    ),
    Drill(
        name="serve, node cut off",
        done="the cable of one of two nodes with an engine is pulled for 20 s",
        whole=f"{_SERVES}, that of the node too; counted from when the cable is back",
        run=serving.cut_off,
        plan=_SERVING,
    ),
    Drill(
        name="distil, storage full",
        done="the disk of checkpoints is filled; later room is made, and the command given again",
        whole=f"{_TRAINS}, counted from when there is room and the command is given",
        run=distilling.storage_full,
        why_not=disks.why_not,
    ),
    Drill(
        name="distil, node's disk full",
        done="the disk of a node that trains (Ray's files, logs, spilled objects) is filled",
        whole="the run goes on",
        run=distilling.node_full,
        plan=Plan(num_workers=2),
        why_not=disks.why_not,
        small_node_bytes=192 * 2**20,
    ),
    Drill(
        name="distil, slow storage",
        done="the disk of checkpoints takes 0.5 MiB a second; what is on it when the first is "
        "reported is looked at, as after a power cut",
        whole="never broken",
        run=distilling.storage_slow,
        why_not=disks.why_not_slow,
    ),
)
