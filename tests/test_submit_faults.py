# SPDX-License-Identifier: Apache-2.0
"""What comes between a run and who asks for it, with a job server that does as a test says."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.config import SubmitConfig
from offsite_ray.errors import ClusterError
from offsite_ray.submit import Job, JobServer, follow, run, stop, submit
from offsite_ray.submit import server as servers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

JOB = Job(
    name="run",
    job="run-1",
    status="RUNNING",
    exit_status=None,
    verb="inspect",
    started="2026-01-01T00:00:00+00:00",
    seconds=1.0,
    node=None,
    message="",
    digest="",
)


class Server(JobServer):
    """A job server of a list of jobs, the last of which ends when its log is read."""

    def __init__(self, *known: Job) -> None:
        self.address = "http://head:8265"
        self.known = list(known)
        self.lost = False

    def jobs(self) -> list[Job]:
        if self.lost:
            raise ClusterError("lost")
        return list(self.known)

    def submit(self, name: str, number: int, entrypoint: str, **given: Any) -> str:
        self.lost = True
        return f"{name}-{number}"

    def stop(self, job: str) -> None:
        self.known = [
            *(replace(one, status="STOPPED") for one in self.known if one.job == job),
            replace(JOB, job="run-2"),
        ]

    async def log(self, job: str) -> AsyncIterator[str]:
        await asyncio.sleep(0)
        yield f"log of {job}\n"
        self.known[-1] = replace(self.known[-1], status="SUCCEEDED")


def test_following_ends_where_nobody_reads() -> None:
    def gone(_: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        follow(Server(JOB), "run-1", gone, print, 1)
    shown: list[str] = []
    assert follow(Server(JOB), "run-1", shown.append, print, 1).status == "SUCCEEDED"
    assert shown == ["log of run-1\n"]


def test_what_was_submitted_is_said_though_the_connection_is_lost_then() -> None:
    config = SubmitConfig(verb="inspect", recipe="r.yaml", name="run", packages="any")
    said: list[str] = []
    with pytest.raises(ClusterError):
        submit(Server(), config, b"", [], said.append)
    assert said == ["submitted run-1"]


def test_stopping_waits_for_the_job_that_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_STOP_S", 1)
    stopped = stop(Server(JOB), "run")
    assert (stopped.job, stopped.status) == ("run-1", "STOPPED"), "not for the next one"


def test_a_server_that_takes_connections_and_says_nothing_answers_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(servers, "_ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ClusterError, match=f"no job server answers at http://127.0.0.1:{port}"):
            JobServer(f"http://127.0.0.1:{port}")
