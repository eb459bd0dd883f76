# SPDX-License-Identifier: Apache-2.0
"""What a drill runs on and what it finds: a cluster to break, and a verdict."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.drills.network import INTERFACE, network, why_not
from cluster.local import Head, Node, Place, free_port, running_head

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from cluster.drills.network import Network

LIMIT_S = 600.0
"""After which a drill waits no longer for anything."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a drill found."""

    lost: Sequence[str]
    """What was reported as durable or done, and is not there; empty, where all is well."""
    cost: str
    """What it cost, in words."""
    whole_after_s: float | None
    """Seconds from the fault until all was as before; None: it never was not."""
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cluster of a drill; its head runs no tasks."""

    num_workers: int = 3
    """Nodes beside the head, with one CPU each."""
    needs_network: bool = False
    """Whether each node must have a network of its own."""
    keeps: str | None = None
    """Where the head keeps what it must not lose: ``"rocksdb"``, ``"redis"``; None: in memory."""


@dataclass(kw_only=True)
class Lab:
    """A cluster that is there to be broken."""

    head: Head
    folder: Path
    """Of the drills' files; what one has made there serves the next."""
    network: Network | None
    workers: dict[int, Node]
    """By their number, from 1."""

    def address(self, number: int) -> str:
        """Return the IP address of a worker."""
        return self.network.address_of(number) if self.network else self.head.place.address

    def start(self, number: int, temp_dir: Path | None = None) -> None:
        """Start a worker, the first time or in the place of one that was lost; wait for it."""
        place = Place(
            address=self.address(number),
            through=self.network.through(number) if self.network else (),
            temp_dir=temp_dir,
            variables={
                # As KubeRay sets it where the head may come back.
                "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
                # The name of this machine leads to no address in a namespace.
                **({"GLOO_SOCKET_IFNAME": INTERFACE} if self.network else {}),
            },
        )
        self.workers[number] = self.head.start_worker("--num-cpus=1", place=place)

    def mend(self) -> None:
        """Start the workers again that are lost."""
        for number, node in list(self.workers.items()):
            if not node.is_running:
                self.start(number)

    def nodes_with(self, title: str) -> list[int]:
        """Return the workers on which a process runs whose command line has some words."""
        found = []
        for number, node in self.workers.items():
            for process in node.processes():
                with contextlib.suppress(Exception):  # it has just ended
                    if title in " ".join(process.cmdline()):
                        found.append(number)
                        break
        return found


@contextlib.contextmanager
def running_lab(plan: Plan, folder: Path, scratch: Path | None = None) -> Iterator[Lab]:
    """Run a cluster for drills until the block ends.

    Args:
        plan: What the drill needs.
        folder: For files of the drills.
        scratch: Directory of the first worker's own files; by default the cluster's.
    """
    reason = why_not()
    if plan.needs_network and reason:
        raise RuntimeError(reason)
    with contextlib.ExitStack() as stack:
        net = None if reason else stack.enter_context(network(plan.num_workers))
        place = Place(
            address=net.address if net else "127.0.0.1",
            variables=stack.enter_context(_KEEPERS[plan.keeps](folder)),
        )
        head = stack.enter_context(running_head("--num-cpus=0", place=place))
        lab = Lab(head=head, folder=folder, network=net, workers={})
        for number in range(1, plan.num_workers + 1):
            lab.start(number, scratch if number == 1 else None)
        yield lab


@contextlib.contextmanager
def _in_memory(_: Path) -> Iterator[dict[str, str]]:
    yield {}


@contextlib.contextmanager
def _in_rocksdb(folder: Path) -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="gcs", dir=folder) as path:
        yield {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": path}


@contextlib.contextmanager
def _in_redis(folder: Path) -> Iterator[dict[str, str]]:
    """Run a Redis that writes through, as cluster/kuberay/model-owner/redis.yaml does."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="redis", dir=folder) as path:
        redis = subprocess.Popen(
            ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", path,
             "--appendonly", "yes", "--appendfsync", "always"],
            stdout=subprocess.DEVNULL, process_group=0,
        )  # fmt: skip
        try:
            yield {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            redis.terminate()
            redis.wait(60)


_KEEPERS: dict[str | None, Callable[[Path], contextlib.AbstractContextManager[dict[str, str]]]] = {
    None: _in_memory,
    "rocksdb": _in_rocksdb,
    "redis": _in_redis,
}


def wait_until(true: Callable[[], bool], what: str, within_s: float = LIMIT_S) -> float:
    """Wait until something is so; return the time it took, in seconds.

    Raises:
        TimeoutError: It never was.
    """
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > within_s:
            raise TimeoutError(f"{what}: not within {within_s:g} s")
        time.sleep(0.1)
    return time.monotonic() - began
