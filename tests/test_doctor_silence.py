# SPDX-License-Identifier: Apache-2.0
"""Preflight where something does not answer, without a cluster."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import ray

from offsite_ray.cli import doctoring
from offsite_ray.config import DoctorConfig
from offsite_ray.doctor import asked_without_token, measure, on_ray
from offsite_ray.doctor.facts import Storage
from offsite_ray.results import to_plain
from tests.test_doctor import HERE, WELL
from tests.websites import Answer, website

if TYPE_CHECKING:
    from pathlib import Path

MEASURING = sys.modules["offsite_ray.doctor.measure"]


def test_of_a_mount_that_hangs_nothing_else_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, usage = threading.Event(), shutil.disk_usage

    def disk_usage(path: Path) -> Any:
        assert path != tmp_path, "it would hang"
        return usage(path)

    monkeypatch.setattr(MEASURING, "try_storage", lambda *_: released.wait())
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    found = measure("a", str(tmp_path), 0.1)
    released.set()
    assert found.storage == Storage(problem="no answer within 0.1 s")


def test_a_node_that_falls_silent_makes_no_other_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two have answered; the first one's clock is asked for until the time is up."""

    class Task:
        def __init__(self, node: Any, function: Any) -> None:
            self.what = (node["NodeID"], function)

        def remote(self, *_: Any) -> Any:
            return self.what

    def get(what: Any, timeout: float = 0.0) -> Any:
        node, function = what
        if function is measure:
            return replace(WELL, node=node, clock_ahead_s=None, round_trip_s=None)
        time.sleep(timeout)
        raise ray.exceptions.GetTimeoutError

    monkeypatch.setattr(on_ray, "_on", Task)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda waiting, **_: (waiting[:1], waiting[1:]))
    nodes = [
        {"NodeID": name, "NodeManagerHostname": name, "NodeName": name, "NodeManagerAddress": name,
         "Resources": {}}
        for name in "ab"
    ]  # fmt: skip
    found = on_ray._measured(nodes, (None,), 0.2)
    assert [(one.node, one.problem, one.clock_ahead_s) for one in found] == [
        ("a", None, None),
        ("b", None, None),
    ]


def test_a_login_page_is_no_dashboard() -> None:
    def answer(path: str) -> Answer:
        return (200, {}) if path == "/login" else (302, {"Location": "/login"})

    with website(answer) as url:
        assert asked_without_token(url) is None


@pytest.mark.parametrize(
    ("inside", "outside", "opened"),
    [(False, None, False), (None, False, False), (None, None, None), (False, True, True)],
)
def test_what_one_has_seen_of_the_dashboard_is_not_forgotten(
    inside: bool | None, outside: bool | None, opened: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"facts": [to_plain(replace(HERE, open_dashboard=inside))]}
    for name, answer in {
        "JobServer": None,
        "read_recipe": None,
        "submit": SimpleNamespace(job="doctor-1"),
        "follow": None,
        "_object_in": told,
        "asked_without_token": outside,
    }.items():
        monkeypatch.setattr(doctoring, name, lambda *_, answer=answer: answer)
    (here,) = doctoring._by_job(DoctorConfig(), "http://127.0.0.1:9", print)
    assert here.open_dashboard is opened
