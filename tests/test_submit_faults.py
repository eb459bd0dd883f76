# SPDX-License-Identifier: Apache-2.0
"""What comes between a run and who asks for it, with a job server that does as a test says."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.submit import Job, follow

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


class Server:
    """A job server that knows the jobs of a list, the last of which ends when its log is read."""

    address = "http://head:8265"

    def __init__(self, *jobs: Job) -> None:
        self.known = list(jobs)

    def jobs(self) -> list[Job]:
        return list(self.known)

    async def log(self, job: str) -> AsyncIterator[str]:
        await asyncio.sleep(0)
        yield f"log of {job}\n"
        self.known[-1] = replace(self.known[-1], status="SUCCEEDED")


def server(*jobs: Job) -> Any:
    return Server(*jobs)


def test_following_ends_where_nobody_reads() -> None:
    def gone(_: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        follow(server(JOB), "run-1", gone, print, 1)
    shown: list[str] = []
    assert follow(server(JOB), "run-1", shown.append, print, 1).status == "SUCCEEDED"
    assert shown == ["log of run-1\n"]
