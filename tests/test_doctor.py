# SPDX-License-Identifier: Apache-2.0
"""Preflight without a cluster: judging plain facts, and measuring this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tomllib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from cluster.local import ROOT, environment, free_port
from offsite_ray.cli import main
from offsite_ray.config import DoctorConfig
from offsite_ray.doctor import (
    CHECKS,
    Facts,
    asked_without_token,
    facts_from_plain,
    judge,
    measure,
    versions,
)
from offsite_ray.doctor.facts import Disk, Extension, Gpu, Storage
from offsite_ray.doctor.measure import PACKAGES, gpus_of, marked, try_storage
from offsite_ray.results import to_plain
from offsite_ray.train.extension import missing_tools
from tests.websites import website

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from offsite_ray.doctor import Finding

GIB = 2**30
CONFIG = DoctorConfig(storage="/runs")
HERE = Facts(node="here", versions={"ray": "2.60.0"}, open_dashboard=False)
WELL = Facts(
    node="a",
    versions={"ray": "2.60.0", "torch": "2.13.0+cpu"},
    num_cpus=8,
    memory_bytes=64 * GIB,
    free_memory_bytes=50 * GIB,
    gpus=(),
    num_torch_gpus=0,
    num_ray_gpus=0.0,
    disks=(Disk(path="/tmp", total_bytes=100 * GIB, free_bytes=50 * GIB, for_ray=True),),
    storage=Storage(shared=True),
    extension=Extension(file="/cache/x.so", compiled=True),
    auth_mode="token",
    clock_ahead_s=0.001,
    round_trip_s=0.004,
)
GPU = Gpu(name="H200", total_bytes=139 * GIB, free_bytes=138 * GIB)
ALONE = replace(WELL, num_ray_gpus=None, clock_ahead_s=None, round_trip_s=None)


def of(check: str, facts: Sequence[Facts], config: DoctorConfig = CONFIG) -> list[Finding]:
    return [finding for finding in judge(facts, config) if finding.check == check]


def test_where_all_is_well_every_check_says_so_in_its_order() -> None:
    findings = judge([HERE, WELL, replace(WELL, node="b")], CONFIG)
    assert [finding.check for finding in findings] == [check.name for check in CHECKS]
    assert {finding.verdict for finding in findings} == {"ok"}
    assert not any(finding.mend or finding.nodes for finding in findings)


def test_a_machine_alone_is_not_asked_for_what_a_cluster_has() -> None:
    verdicts = {finding.check: finding.verdict for finding in judge([ALONE], DoctorConfig())}
    assert {name for name, verdict in verdicts.items() if verdict == "not measured"} == {
        "GPUs in Ray",
        "authentication",
        "clock",
    }
    (finding,) = of("storage", [replace(ALONE, storage=None)], DoctorConfig())
    assert (finding.verdict, finding.found) == ("not measured", "no --storage was given")


DISK = WELL.disks[0]


@pytest.mark.parametrize(
    ("check", "changes", "verdict", "found"),
    [
        ("nodes", {"problem": "no answer within 60 s"}, "failed", "no answer within 60 s"),
        ("versions", {"versions": {"ray": "2.59.1"}}, "failed", "ray 2.59.1, but 2.60.0 on here"),
        ("versions", {"versions": {"ray": None}}, "failed", "ray is missing"),
        ("versions", {"versions": {"torch": "2.13.0+cu130"}}, "ok", "2, the same"),
        ("GPUs in torch", {"gpus": (GPU,)}, "failed", "torch sees 0 of 1 GPUs"),
        ("GPUs in torch", {"gpus": (GPU, GPU), "num_torch_gpus": 1}, "warning", "sees 1 of 2"),
        ("GPUs in torch", {"gpus": None, "num_torch_gpus": 2}, "ok", "torch sees 2"),
        ("GPUs in Ray", {"num_ray_gpus": 1.0}, "failed", "Ray counts 1 GPUs, torch sees 0"),
        ("GPUs in Ray", {"num_torch_gpus": 1}, "warning", "Ray counts 0 GPUs, torch sees 1"),
        ("memory", {"free_memory_bytes": GIB}, "failed", "1.0 GiB free, less than 2 GiB"),
        ("memory", {"free_memory_bytes": 2 * GIB}, "ok", "at least 2.0 GiB free"),
        (
            "disk",
            {"disks": (replace(DISK, free_bytes=9 * GIB),)},
            "failed",
            "/tmp: 9.0 GiB of 100.0 GiB free, less than 10 GiB",
        ),
        (
            "disk",
            {"disks": (replace(DISK, total_bytes=1001 * GIB),)},
            "failed",
            "less than 5%, where Ray takes no more objects",
        ),
        (
            "disk",
            {"disks": (replace(DISK, total_bytes=1001 * GIB, for_ray=False),)},
            "ok",
            "at least 50.0 GiB free",
        ),
        ("storage", {"storage": Storage(problem="Permission denied")}, "failed", "Permission"),
        ("storage shared", {"storage": Storage(shared=False)}, "failed", "is not there"),
        (
            "compiler",
            {"extension": Extension(file="/x", compiled=False, missing=("ninja",))},
            "failed",
            "missing: ninja",
        ),
        (
            "compiler",
            {"extension": Extension(file="/x", compiled=True, missing=("ninja",))},
            "warning",
            "missing: ninja; it is compiled",
        ),
        (
            "compiler",
            {
                "extension": Extension(file="/x", compiled=False, missing=("ninja",)),
                "num_torch_gpus": 1,
            },
            "ok",
            "not needed on GPUs",
        ),
        (
            "extension",
            {"extension": Extension(file="/x.so", compiled=False)},
            "warning",
            "not compiled yet",
        ),
        ("authentication", {"auth_mode": None}, "warning", "RAY_AUTH_MODE is not set"),
        ("authentication", {"auth_mode": "disabled"}, "failed", "RAY_AUTH_MODE is disabled"),
        ("clock", {"clock_ahead_s": 90.0}, "failed", "90.0 s ahead of the asking node's"),
        ("clock", {"clock_ahead_s": -2.0}, "failed", "2.0 s behind the asking node's"),
        (
            "clock",
            {"clock_ahead_s": 3.0, "round_trip_s": 3.5},
            "not measured",
            "the node took 3.5 s to tell the time",
        ),
    ],
)
def test_a_fault_is_found_on_its_node_and_can_be_mended(
    check: str, changes: dict[str, Any], verdict: str, found: str
) -> None:
    odd = replace(WELL, **{"node": "b", **changes})
    findings = of(check, [HERE, WELL, odd])
    (finding,) = [finding for finding in findings if found in finding.found]
    assert finding.verdict == verdict
    if verdict == "ok":
        assert (finding.nodes, finding.mend) == ((), None)
        return
    assert finding.nodes == ("b",)
    assert (finding.mend is None) == (verdict == "not measured")
    if verdict != "not measured":
        assert findings == [finding], "what is well is not said beside it"


def test_the_same_fault_of_several_nodes_is_said_once() -> None:
    odd = [replace(WELL, node=name, auth_mode=None) for name in "bcd"]
    (finding,) = of("authentication", [HERE, WELL, *odd])
    assert finding.nodes == ("b", "c", "d")


def test_a_dashboard_that_answers_anybody_is_a_fault() -> None:
    (finding,) = of("authentication", [replace(HERE, open_dashboard=True), WELL])
    assert finding.verdict == "failed"
    assert "without a token" in finding.found
    (finding,) = of("authentication", [replace(HERE, open_dashboard=None), WELL])
    assert (finding.verdict, finding.found) == ("not measured", "no dashboard answers")


def test_of_a_silent_node_only_that_is_said() -> None:
    silent = Facts(node="b", problem="no answer within 5 s", num_cpus=4.0, num_ray_gpus=0.0)
    bad = [f for f in judge([HERE, WELL, silent], CONFIG) if f.verdict in ("failed", "warning")]
    assert [(finding.check, finding.nodes) for finding in bad] == [("nodes", ("b",))]


# Whatever is measured


few = st.floats(min_value=-1e6, max_value=1e6)
sizes = st.integers(min_value=0, max_value=2**50)
facts = st.builds(
    Facts,
    node=st.sampled_from("abc"),
    problem=st.none() | st.just("it is off"),
    versions=st.none()
    | st.dictionaries(
        st.sampled_from(["ray", "torch"]), st.sampled_from(["1", "1+cpu", "2", None])
    ),
    num_cpus=st.none() | few,
    memory_bytes=st.none() | sizes,
    free_memory_bytes=st.none() | sizes,
    gpus=st.none() | st.lists(st.just(GPU), max_size=2).map(tuple),
    num_torch_gpus=st.none() | st.integers(0, 3),
    num_ray_gpus=st.none() | st.floats(0, 3),
    disks=st.lists(
        st.builds(Disk, path=st.just("/t"), total_bytes=sizes, free_bytes=sizes), max_size=2
    ).map(tuple),
    storage=st.none() | st.builds(Storage, shared=st.none() | st.booleans()),
    extension=st.none()
    | st.builds(
        Extension, file=st.just("/x"), compiled=st.booleans(), missing=st.just(()) | st.just(("c",))
    ),
    auth_mode=st.none() | st.sampled_from(["token", "disabled"]),
    open_dashboard=st.none() | st.booleans(),
    clock_ahead_s=st.none() | few,
    round_trip_s=st.none() | st.floats(0, 100),
)


@given(st.lists(facts, min_size=1, max_size=4))
def test_whatever_is_known_every_check_has_its_say(known: list[Facts]) -> None:
    findings = judge(known, CONFIG)
    assert list(dict.fromkeys(f.check for f in findings)) == [check.name for check in CHECKS]
    for finding in findings:
        assert (finding.mend is not None) == (finding.verdict in ("failed", "warning"))
        assert set(finding.nodes) <= {one.node for one in known}
    sent = json.loads(json.dumps([to_plain(one) for one in known]))
    assert [facts_from_plain(one) for one in sent] == known


@given(few, st.floats(0, 1e6), st.floats(0, 100))
def test_a_clock_is_wrong_only_beyond_what_is_uncertain(
    ahead: float, within: float, allowed: float
) -> None:
    odd = replace(WELL, clock_ahead_s=ahead, round_trip_s=within)
    (finding,) = of("clock", [odd], DoctorConfig(max_clock_skew=allowed))
    assert (finding.verdict == "failed") == (abs(ahead) - within > allowed)
    assert finding.verdict != "failed" or abs(ahead) > within


@given(st.permutations([HERE, WELL, replace(WELL, node="b"), replace(WELL, node="c")]))
def test_the_order_of_nodes_decides_nothing(order: list[Facts]) -> None:
    order[0] = replace(order[0], versions={"ray": "3"})
    assert {f.verdict for f in of("versions", order)} == {"failed"}
    assert {f.verdict for f in of("versions", order[::-1])} == {"failed"}


# This machine


def test_the_packages_are_those_that_are_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(PACKAGES) == sorted(Requirement(line).name for line in project["dependencies"])
    assert None not in versions().values()


def test_storage_is_written_read_removed_and_the_same(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with marked(str(tmp_path), 60.0) as marker:
        assert try_storage(str(tmp_path), marker) == Storage(shared=True)
        assert try_storage(str(other), marker) == Storage(shared=False)
        assert try_storage(f"file://{tmp_path}", None) == Storage()
    assert os.listdir(tmp_path) == ["other"]
    assert os.listdir(other) == []
    nowhere = str(tmp_path / "nowhere")
    assert try_storage(nowhere, None) == Storage(problem="No such file or directory")
    unknown = try_storage("nosuch://x", None).problem or ""
    assert unknown.startswith("nosuch://x is on no filesystem that can be used here")
    with marked(nowhere, 60.0) as marker:
        assert marker is None


def test_a_machine_is_measured(tmp_path: Path) -> None:
    measured = measure("me", str(tmp_path), 60.0, ray_folder=str(tmp_path / "not-there-yet"))
    assert measured.problem is None
    assert measured.storage == Storage()
    assert measured.extension is not None
    assert measured.extension.file.endswith("deepspeed_shm_comm.so")
    assert measured.disks[0].for_ray
    assert 0 < (measured.free_memory_bytes or 0) <= (measured.memory_bytes or 0)


def test_storage_that_hangs_keeps_nobody_waiting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it connects, and that is all
        address = f"endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http"
        words = [f"--storage=s3://bucket/runs?{address}&region=us-east-1", "--timeout=1"]
        done = subprocess.run(
            [sys.executable, "-m", "offsite_ray", "doctor", "--json", *words],
            env=environment(AWS_ACCESS_KEY_ID="k", AWS_SECRET_ACCESS_KEY="s"),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (found,) = [f for f in json.loads(done.stdout)["findings"] if f["check"] == "storage"]
    assert found["found"] == "no answer within 1 s"


def test_what_compiles_the_extension_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_tools() == ()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert missing_tools() == ("no-such-compiler", "ninja")


def test_what_nvidia_smi_tells_is_read() -> None:
    table = "NVIDIA H200, 143771, 143150\nNVIDIA GH200, 480GB, [N/A], [N/A]\n\n"
    assert gpus_of(table) == (
        Gpu(name="NVIDIA H200", total_bytes=143771 * 2**20, free_bytes=143150 * 2**20),
        Gpu(name="NVIDIA GH200, 480GB", total_bytes=None, free_bytes=None),
    )


def test_who_answers_without_a_token_is_found_out() -> None:
    with website(lambda _: (200, {})) as url:
        assert asked_without_token(f"{url}/") is True
    assert asked_without_token(f"http://127.0.0.1:{free_port()}") is None


# The command line


def test_one_machine_needs_no_ray(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    limits = ["--min-free-disk-gib=0", "--min-free-memory-gib=0", "--json"]
    assert main(["doctor", f"--storage={tmp_path}", *limits]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fit"] is True
    assert [one["node"] for one in told["facts"]] == ["this machine"]
    assert main(["doctor", f"--storage={tmp_path}/nowhere", "--min-free-disk-gib=1e9"]) == 1
    out, err = capsys.readouterr()
    assert "not fit: disk, storage; each finding says how to mend it" in err
    assert "No such file or directory" in " ".join(out.split())


def test_a_ray_that_is_gone_keeps_nobody_waiting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    assert main(["doctor"]) == 1
    assert "no Ray answers at RAY_ADDRESS=127.0.0.1:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--address=head:8265"], "address='head:8265' must be http://HOST:PORT"),
        (["--address=http://h:1", "--storage=runs"], "storage='runs' must be a whole path or a"),
        (["--timeout=0"], "timeout=0.0 must be above 0"),
        (["--max-clock-skew=-1"], "max_clock_skew=-1.0 must be at least 0"),
        (
            ["--address=http://127.0.0.1:9", "--storage=s3://me:HIDDEN@b/x"],
            "no job server answers at http://127.0.0.1:9",
        ),
    ],
)
def test_a_mistake_is_said_in_a_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *words]) == (1 if "answers" in said else 2)
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert "HIDDEN" not in err
