# SPDX-License-Identifier: Apache-2.0
"""Several Ray nodes on one machine, from the command line."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil

from cluster.local import ROOT, Head, answers, environment

COMMAND = (sys.executable, str(ROOT / "cluster" / "local.py"))


def test_nodes_run_until_a_signal_and_leave_nothing_behind() -> None:
    process = subprocess.Popen(
        [*COMMAND, "--nodes=2", "--num-cpus=1", '--resources={"steady": 1}', "--labels=tier=a"],
        env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        words = dict(w.split("=", 1) for line in lines for w in line.split() if "=" in w)
        token = Path(words["RAY_AUTH_TOKEN_PATH"])
        head = Head(
            dashboard=words["RAY_API_SERVER_ADDRESS"], gcs=words["RAY_ADDRESS"],
            token=token.read_text(), scratch=str(token.parent),
        )  # fmt: skip
        assert token.stat().st_mode & 0o077 == 0
        assert not answers(f"{head.dashboard}/api/version"), "nobody is let in without a token"
        (_, other) = nodes = list(head.nodes().values())
        assert all(
            n["resources_total"]["CPU"] == n["resources_total"]["steady"] == 1 for n in nodes
        )
        assert other["labels"]["tier"] == "a"
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)  # pressed once more, it ends no sooner and no worse
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert psutil.wait_procs(family, timeout=0)[1] == []
    assert not token.parent.exists()


def test_a_node_that_cannot_start_is_told() -> None:
    done = subprocess.run(
        [*COMMAND, "--resources={"], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "a Ray node did not start:" in done.stderr
    assert "--resources" in done.stderr
