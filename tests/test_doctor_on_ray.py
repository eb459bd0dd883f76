# SPDX-License-Identifier: Apache-2.0
"""Preflight of a real cluster with token authentication, one of whose two nodes is not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from cluster.local import ROOT, Head, Node, Place, running_head

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.long

ODD = "node-1"
"""As cluster/local.py names the node beside the head."""
# What it does to the disks, nobody else sees: the storage is read-only, and one disk is small.
DISKS = """
mount --bind "$STORAGE" "$STORAGE"
mount -o remount,bind,ro "$STORAGE"
mount -t tmpfs -o size=4m tmpfs "$TMPDIR"
exec "$@"
"""
CLOCK = "import time\nright = time.time\ntime.time = lambda: right() + 3600\n"
ANY_SIZE = ("--min-free-disk-gib=0.01", "--min-free-memory-gib=0")


def without_others(*more: str) -> list[str]:
    """Return a command whose mounts are its own; without root, in a namespace of users too."""
    return ["unshare", "-m" if os.geteuid() == 0 else "-rm", "sh", "-euc", *more]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # A node that hangs is to be found by who asks it, not to be given up before.
    patient = '--system-config={"health_check_failure_threshold": 1000}'
    with running_head("--num-cpus=2", patient) as found:
        yield found


@pytest.fixture(scope="module")
def odd(head: Head, storage: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Run a node with another version, another clock, read-only storage and a small disk."""
    folder = tmp_path_factory.mktemp(ODD)
    (folder / "blake3-0.0.1.dist-info").mkdir()
    about = "Metadata-Version: 2.1\nName: blake3\nVersion: 0.0.1\n"
    (folder / "blake3-0.0.1.dist-info" / "METADATA").write_text(about)
    (folder / "sitecustomize.py").write_text(CLOCK)
    (folder / "small").mkdir()
    given = {
        "STORAGE": str(storage),
        "TMPDIR": str(folder / "small"),
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    if subprocess.run(
        without_others(DISKS, "sh", "true"), env={**os.environ, **given}, check=False
    ).returncode:
        pytest.skip("no mounts of its own can be given to a process here (unshare)")
    # An address of its own, or drivers might take it for the node that they are on.
    place = Place(address="127.0.0.2", through=without_others(DISKS, "sh"), variables=given)
    with head.worker("--num-cpus=1", place=place) as node:
        yield node


def doctor(head: Head, *words: str, **env: str) -> tuple[int, dict[str, Any], str]:
    """Return the exit status, the object on stdout and what is on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "offsite_ray", "doctor", "--json", *ANY_SIZE, *words],
        env={**head.environment, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def failed(told: dict[str, Any]) -> dict[str, str]:
    """Return what failed on the odd node, by check; what it has in common with others is not."""
    return {
        finding["check"]: finding["found"]
        for finding in told["findings"]
        if finding["verdict"] == "failed" and finding["nodes"] == [ODD]
    }


def test_a_node_that_is_well_is_fit(head: Head, storage: Path) -> None:
    words = (f"--storage={storage}", "--timeout=600")
    status, told, said = doctor(head, *words, RAY_ADDRESS=head.gcs)
    assert (status, told["fit"]) == (0, True), said + json.dumps(told["findings"])
    here, node = told["facts"]
    assert here["open_dashboard"] is False
    assert node["storage"] == {"problem": None, "shared": True}
    assert abs(node["clock_ahead_s"]) <= node["round_trip_s"]


def test_a_job_finds_what_is_wrong_with_a_node(head: Head, odd: Node, storage: Path) -> None:
    words = (f"--address={head.dashboard}", f"--storage={storage}", "--timeout=600")
    status, told, said = doctor(head, *words)
    assert status == 1, said
    found = failed(told)
    assert found["versions"].startswith("blake3 0.0.1, but ")
    assert found["versions"].endswith(" on here")
    assert found["storage"] == "Read-only file system"
    assert found["clock"].startswith("3600.")
    assert found["disk"].startswith(f"{odd_folder(told)}: ")
    assert set(found) == {"versions", "storage", "clock", "disk"}, said
    verdicts = {(f["check"], tuple(f["nodes"])): f["verdict"] for f in told["findings"]}
    assert verdicts["extension", (ODD,)] == "warning"
    assert verdicts["authentication", ()] == "ok", "the dashboard is asked, and refuses"
    assert verdicts["nodes", ()] == "ok"
    assert list(storage.iterdir()) == []
    assert head.token not in json.dumps(told) + said
    assert "not fit: " in said.splitlines()[-1]


def odd_folder(told: dict[str, Any]) -> str:
    (facts,) = [one for one in told["facts"] if one["node"] == ODD]
    return str(min(facts["disks"], key=lambda disk: disk["total_bytes"])["path"])


def test_a_node_that_hangs_is_found_in_time(head: Head, odd: Node) -> None:
    (raylet,) = [p for p in odd.processes() if p.name() == "raylet"]
    raylet.send_signal(signal.SIGSTOP)
    try:
        status, told, said = doctor(head, "--timeout=15", RAY_ADDRESS=head.gcs)
    finally:
        raylet.send_signal(signal.SIGCONT)
    assert status == 1, said
    (finding,) = [
        finding for finding in told["findings"]
        if finding["check"] == "nodes" and ODD in finding["nodes"]
    ]  # fmt: skip
    assert finding["found"] == "no answer within 15 s"
    assert "a node that hangs is ended" in finding["mend"]
