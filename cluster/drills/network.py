# SPDX-License-Identifier: Apache-2.0
"""A network of its own for each node: network namespaces on one bridge, whose cables can be pulled.

It takes root and ``ip``. The head stays outside, at the bridge, and so do clients.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERFACE = "eth0"
"""Of each node, in its namespace."""


@dataclass(frozen=True)
class Network:
    """A bridge, and cables from it to namespaces."""

    name: str
    subnet: str
    """The first three numbers of its addresses."""

    @property
    def address(self) -> str:
        """Of the bridge, where the head is."""
        return f"{self.subnet}.1"

    def address_of(self, number: int) -> str:
        """Return the address of a node, counted from 1."""
        return f"{self.subnet}.{number + 1}"

    def through(self, number: int) -> tuple[str, ...]:
        """Return the command that runs another one on a node."""
        # Not "ip netns exec": that gives a file system tree of its own, in which disks that are
        # mounted later are not seen.
        return ("nsenter", f"--net=/run/netns/{self.name}-{number}")

    def plug(self, number: int) -> None:
        """Give a node its namespace, its cable and its address."""
        space, cable = f"{self.name}-{number}", f"{self.name}v{number}"
        inside = ("ip", "-n", space)
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", cable, "type", "veth", "peer", INTERFACE, "netns", space)
        _run(*inside, "addr", "add", f"{self.address_of(number)}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _run(*inside, "link", "set", interface, "up")
        _run("ip", "link", "set", cable, "master", self.name, "up")

    def unplug(self, number: int) -> None:
        """Remove a node's namespace, as far as it is there."""
        _run("ip", "netns", "delete", f"{self.name}-{number}", check=False)

    @contextlib.contextmanager
    def cut(self, number: int) -> Iterator[None]:
        """Pull the cable of a node at the bridge: what it sends is lost, and nobody is told."""
        cable = f"{self.name}v{number}"
        _run("ip", "link", "set", cable, "nomaster")
        try:
            yield
        finally:
            _run("ip", "link", "set", cable, "master", self.name)


def why_not() -> str | None:
    """Return why there can be no network here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    if shutil.which("ip") is None:
        return "ip is not installed (Debian, Ubuntu: apt install iproute2)"
    name = f"or{os.getpid()}-try"
    made = _run("ip", "netns", "add", name, check=False)
    _run("ip", "netns", "delete", name, check=False)
    return None if made else "the kernel makes no network namespace here"


@contextlib.contextmanager
def network(num_nodes: int) -> Iterator[Network]:
    """Make a network for some nodes, until the block ends."""
    # An interface's name has at most 15 characters. The addresses are those for tests of networks
    # (RFC 2544), and two processes side by side have others.
    made = Network(f"or{os.getpid()}", f"198.18.{os.getpid() % 256}")
    try:
        _run("ip", "link", "add", made.name, "type", "bridge")
        _run("ip", "addr", "add", f"{made.address}/24", "dev", made.name)
        _run("ip", "link", "set", made.name, "up")
        for number in range(1, num_nodes + 1):
            made.plug(number)
        yield made
    finally:
        for number in range(1, num_nodes + 1):
            made.unplug(number)
        _run("ip", "link", "delete", made.name, check=False)


def _run(*command: str, check: bool = True) -> bool:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.returncode == 0
