# SPDX-License-Identifier: Apache-2.0
"""A real Ray of its own, started by ``ray start``, with token authentication."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

from tests.deployed import eventually, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LONG_S = 180.0


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that finds this Python and no Ray of others."""
    given = {name: value for name, value in os.environ.items() if not name.endswith("_ADDRESS")}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**given, "PATH": path, "PYTHONPATH": str(ROOT), **more}


def answers(url: str, headers: dict[str, str] | None = None) -> bool:
    """Return whether somebody answers, and well."""
    try:
        return requests.get(url, headers=headers, timeout=5).ok
    except requests.RequestException:
        return False


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head, and what is needed to use it."""

    dashboard: str
    gcs: str
    token: str
    scratch: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def environment(self) -> dict[str, str]:
        # Ray wants a token as soon as one is in the home directory, where any ray.init may put it.
        return environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=self.token)

    @contextlib.contextmanager
    def running(
        self, *flags: str, within: Sequence[str] = (), **env: str
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run ``ray start`` until the block ends; every file of it is in one place.

        Args:
            *flags: Of ``ray start``.
            within: Command that runs it, by its last words.
            **env: Of the node's processes.
        """
        process = subprocess.Popen(
            [*within, BIN / "ray", "start", "--block", f"--temp-dir={self.scratch}",
             f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats", *flags],
            env={**self.environment, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", **env},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)

    def worker(
        self, *flags: str, within: Sequence[str] = (), **env: str
    ) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        """Run another node on this machine until the block ends."""
        address = (f"--address={self.gcs}", "--node-ip-address=127.0.0.1")
        return self.running(*address, *flags, within=within, **env)

    def nodes(self) -> list[dict[str, Any]]:
        """Return what the dashboard tells of the nodes that are alive."""
        url = f"{self.dashboard}/api/v0/nodes"
        answer = requests.get(url, headers=self.headers, timeout=30)
        found: list[dict[str, Any]] = answer.json()["data"]["result"]["result"]
        return [node for node in found if node["state"] == "ALIVE"]


@contextlib.contextmanager
def running_head(*flags: str) -> Iterator[Head]:
    """Run a head with its dashboard, whose address no other process finds by itself."""
    gcs, dashboard = free_port(), free_port()
    # Not below pytest's directory: the paths of sockets would be too long.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as scratch:
        head = Head(
            dashboard=f"http://127.0.0.1:{dashboard}",
            gcs=f"127.0.0.1:{gcs}",
            token=secrets.token_hex(32),
            scratch=scratch,
        )
        with head.running(
            "--head", f"--port={gcs}", f"--dashboard-port={dashboard}",
            "--include-dashboard=true", "--node-ip-address=127.0.0.1", *flags,
        ):  # fmt: skip
            eventually(lambda: answers(f"{head.dashboard}/api/version", head.headers), LONG_S)
            yield head
