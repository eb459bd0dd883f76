# SPDX-License-Identifier: Apache-2.0
"""Following a job to its end, also where the connection is lost meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import ClusterError, JobError

if TYPE_CHECKING:
    from collections.abc import Callable

    from offsite_ray.submit.server import Job, JobServer

_QUIET_S = 60.0
"""Without a word, after which the connection is made anew: nothing says that it is there."""
_PAUSE_S = 1.0
"""Between two attempts."""
_MOST_ATTEMPTS = 5
"""At the log of a job that has ended: its node may have gone with it."""


def follow(
    server: JobServer,
    job: str,
    show: Callable[[str], None],
    notice: Callable[[str], None],
    patience: float,
) -> Job:
    """Show a job's log as it grows, and return the job when it has ended.

    Args:
        server: Of the cluster.
        job: Which one.
        show: Told each part of the log once, whatever becomes of the connection.
        notice: Told what else there is.
        patience: Seconds to wait for a server that does not answer.

    Raises:
        ClusterError: The server does not answer for so long.
        JobError: It knows the job no more.
    """
    log = _Log(show)
    lost_at: float | None = None
    at_end, attempts = False, 0
    while True:
        try:
            found = server.job(job)
        except JobError:
            raise
        except ClusterError as error:
            if lost_at is None:
                lost_at = time.monotonic()
                notice(f"lost {server.address}; {job} goes on, trying again for {patience:g} s")
            if time.monotonic() - lost_at > patience:
                raise ClusterError(f"gave up following {job}, which may go on: {error}") from error
            time.sleep(_PAUSE_S)
            continue
        if lost_at is not None:
            notice(f"{server.address} is back")
            lost_at = None
        if found.ended and (at_end or attempts == _MOST_ATTEMPTS):
            return found
        if attempts and found.status == "PENDING":
            notice(f"{job} waits: {found.message}")
        if attempts:
            time.sleep(_PAUSE_S)
        attempts = attempts + 1 if found.ended else 1
        at_end = asyncio.run(_stream(server, job, log))


class _Log:
    """What has been shown of a log, which each connection sends from its beginning."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._shown = 0
        self._again = 0

    def begin(self) -> None:
        """Expect the log from its beginning."""
        self._again = self._shown

    def take(self, text: str) -> None:
        """Show what is new of the next part."""
        new = text[self._again :]
        self._again -= len(text) - len(new)
        self._shown += len(new)
        if new:
            self._show(new)


async def _stream(server: JobServer, job: str, log: _Log) -> bool:
    """Take the log until the connection ends; return whether the server ended it."""
    import aiohttp

    log.begin()
    # A generator, though typed as an iterator: closed, it closes its connection.
    parts: Any = server.log(job)
    async with contextlib.aclosing(parts):
        while True:
            try:
                part = await asyncio.wait_for(anext(parts), _QUIET_S)
            except StopAsyncIteration:
                return True
            except (OSError, RuntimeError, aiohttp.ClientError):
                return False
            log.take(part)
