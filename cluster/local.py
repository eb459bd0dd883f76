# SPDX-License-Identifier: Apache-2.0
"""Several Ray nodes on one machine, for development, drills and tests.

    python cluster/local.py --nodes 3 --num-cpus 2 [--resources '{"steady": 1}'] [--labels tier=a]

prints what to export for ``offsite-ray submit``, and runs until Ctrl-C or SIGTERM, which end all of
it. CPUs and resources are logical: Ray counts them, nobody measures. Every file is in a temporary
directory, and whoever has not its token is refused. It needs the development dependencies.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LONG_S = 300.0
"""Within which a node is up, on a busy machine."""
_STOP_S = 60.0
_ATTEMPTS = 3
"""At starting a node."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where on the machine a node runs."""

    address: str = "127.0.0.1"
    """IP address of the node."""
    through: Sequence[str] = ()
    """Command that runs another one there, e.g. ``nsenter --net=FILE``."""
    temp_dir: Path | None = None
    """Directory of the node's files; by default the cluster's."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of the environment, for the node and what runs on it."""


HERE = Place()


class Node:
    """A running ``ray start``, with all that it has started."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        """Start it; a Ctrl-C in the terminal does not reach it."""
        self.log = log
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                command, env=variables, stdout=said, stderr=said, process_group=0
            )

    @property
    def is_running(self) -> bool:
        """Whether its ``ray start`` has not ended."""
        return self._process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """Return its processes; none of one that has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._process.pid)
            return [first, *first.children(recursive=True)]
        return []

    def kill(self) -> None:
        """End all of its processes at once, by kill -9."""
        _kill(self.processes())
        self._process.wait(_STOP_S)

    def stop(self) -> None:
        """Tell it to end; what is left after a minute is killed."""
        family = self.processes()
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        # What a worker of Ray has started itself may not have noticed.
        _kill([*self.processes(), *psutil.wait_procs(family, timeout=5)[1]])
        self._process.wait(_STOP_S)


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=_STOP_S)


@dataclass(frozen=True, kw_only=True)
class Head:
    """A cluster by its head: what is needed to use it, and to give it more nodes."""

    dashboard: str
    """URL, also of the job server."""
    gcs: str
    """``HOST:PORT`` that nodes and drivers connect to."""
    token: str
    scratch: str
    """Directory of all files."""
    flags: Sequence[str] = ()
    """Of the head's ``ray start``."""
    place: Place = HERE
    """Of the head."""
    started: list[Node] = field(default_factory=list)
    """Nodes, the first head first; those that have ended too."""

    @property
    def headers(self) -> dict[str, str]:
        """Of requests to the dashboard."""
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def environment(self) -> dict[str, str]:
        """Of processes that use the cluster."""
        # Ray wants a token as soon as one is in the home directory, where any ray.init may put it.
        return environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=self.token)

    @property
    def token_file(self) -> Path:
        """File with the token, which nobody else may read."""
        return Path(self.scratch) / "token"

    def start_head(self) -> Node:
        """Start the head, also once more after it was lost, and wait until it answers."""
        # A head that was killed leaves its address here, and processes of the other nodes, which
        # are on this machine too, name it: Ray would take that for a head that is at work.
        Path(self.place.temp_dir or self.scratch, "ray_current_cluster").unlink(missing_ok=True)
        flags = (
            "--head", f"--port={self.gcs.rpartition(':')[2]}", "--include-dashboard=true",
            f"--dashboard-host={self.place.address}",
            f"--dashboard-port={self.dashboard.rpartition(':')[2]}", *self.flags,
        )  # fmt: skip
        return self._start(flags, self.place)

    def start_worker(self, *flags: str, place: Place = HERE) -> Node:
        """Start another node, and wait until it is alive."""
        flags = (f"--address={self.gcs}", *flags)
        return self._start(flags, place)

    @contextlib.contextmanager
    def worker(self, *flags: str, place: Place = HERE) -> Iterator[Node]:
        """Run another node until the block ends."""
        node = self.start_worker(*flags, place=place)
        try:
            yield node
        finally:
            node.stop()

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Return the nodes that are alive, by name, as Ray's state API describes them."""
        asked = urllib.request.Request(f"{self.dashboard}/api/v0/nodes", headers=self.headers)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            found = json.load(answer)["data"]["result"]["result"]
        return {node["node_name"]: node for node in found if node["state"] == "ALIVE"}

    def _start(self, flags: Sequence[str], place: Place) -> Node:
        """Start a node and wait until it is alive.

        Raises:
            RuntimeError: It does not start; with what it said.
        """
        for _ in range(_ATTEMPTS):
            name = f"node-{len(self.started)}"
            log = Path(self.scratch) / f"{name}.log"
            command = [
                *place.through, str(BIN / "ray"), "start", "--block", f"--node-name={name}",
                f"--temp-dir={place.temp_dir or self.scratch}",
                f"--node-ip-address={place.address}",
                f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats", *flags,
            ]  # fmt: skip
            variables = {
                **self.environment,
                "RAY_DASHBOARD_STARTUP_TIMEOUT_S": f"{LONG_S:g}",
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
                **place.variables,
            }
            node = Node(command, variables, log)
            self.started.append(node)
            if self._comes_up(node, name):
                return node
            node.stop()
            said = log.read_text(errors="replace")
            # Ray gives a node half a minute, whatever else this machine has to do.
            if "timed out during startup" not in said:
                break
        raise RuntimeError(f"a Ray node did not start:\n{said[-2000:]}")

    def _comes_up(self, node: Node, name: str) -> bool:
        until = time.monotonic() + LONG_S
        while node.is_running and time.monotonic() < until:
            with contextlib.suppress(OSError):  # the dashboard may be on its way too
                if name in self.nodes():
                    return True
            time.sleep(0.2)
        return False


@contextlib.contextmanager
def running_head(*flags: str, place: Place = HERE) -> Iterator[Head]:
    """Run a head with its dashboard, whose address no other process finds by itself."""
    # Short: the paths of sockets would be too long below most others.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as scratch:
        head = Head(
            dashboard=f"http://{place.address}:{free_port()}",
            gcs=f"{place.address}:{free_port()}",
            token=secrets.token_hex(32),
            scratch=scratch,
            flags=flags,
            place=place,
        )
        head.token_file.touch(mode=0o600)
        head.token_file.write_text(head.token)
        try:
            head.start_head()
            yield head
        finally:
            for node in reversed(head.started):
                node.stop()


@contextlib.contextmanager
def running_cluster(num_nodes: int, *flags: str) -> Iterator[Head]:
    """Run a head and further nodes like it; wait until all are alive."""
    with running_head(*flags) as head:
        for _ in range(num_nodes - 1):
            head.start_worker(*flags)
        yield head


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that finds this Python and no Ray of others."""
    given = {name: value for name, value in os.environ.items() if not name.endswith("_ADDRESS")}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**given, "PATH": path, "PYTHONPATH": str(ROOT), **more}


def answers(url: str, headers: Mapping[str, str] | None = None) -> bool:
    """Return whether somebody answers, and well."""
    try:
        asked = urllib.request.Request(url, headers=dict(headers or {}))
        with urllib.request.urlopen(asked, timeout=5) as answer:
            return bool(answer.status < 400)
    except (OSError, ValueError):
        return False


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def exports(head: Head) -> str:
    """Return what a shell needs to use a cluster."""
    return (
        "# for `offsite-ray submit`\n"
        f"export RAY_API_SERVER_ADDRESS={head.dashboard}\n"
        f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={head.token_file}\n"
        "# for any other verb, whose driver runs in your shell then\n"
        f"# export RAY_ADDRESS={head.gcs}"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run a cluster until a signal ends it."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2, help="the head among them; default 2")
    parser.add_argument("--num-cpus", type=float, default=2, help="of each node; default 2")
    parser.add_argument("--num-gpus", type=float, default=0, help="of each node; default 0")
    parser.add_argument("--resources", default="{}", help="more of each node, as JSON")
    parser.add_argument("--labels", default="", help="of each node: KEY=VALUE,...")
    given = parser.parse_args(words)
    if given.nodes < 1:
        parser.error(f"--nodes {given.nodes} must be at least 1")
    flags = [
        f"--num-cpus={given.num_cpus:g}", f"--num-gpus={given.num_gpus:g}",
        f"--resources={given.resources}", *([f"--labels={given.labels}"] if given.labels else []),
    ]  # fmt: skip
    ends = (signal.SIGINT, signal.SIGTERM)

    def end(*_: object) -> None:
        # Once: the nodes are to be ended whatever is pressed meanwhile.
        for number in ends:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in ends:
        signal.signal(number, end)
    try:
        with running_cluster(given.nodes, *flags) as head:
            print(exports(head), flush=True)
            signal.pause()
    except KeyboardInterrupt:
        return 0
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    raise AssertionError("it ended without a signal")


if __name__ == "__main__":
    sys.exit(main())
