# SPDX-License-Identifier: Apache-2.0
"""An engine whose tenants are those of the store, on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from offsite_ray.errors import LostError
from offsite_ray.serving.requests import Request
from offsite_ray.serving.routing import BASE
from offsite_ray.serving.tenants import read_own

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from offsite_ray.emulator import FullModel
    from offsite_ray.serving.asks import Ask, Records
    from offsite_ray.serving.engine import Engine
    from offsite_ray.serving.meters import Meters
    from offsite_ray.serving.own import Own
    from offsite_ray.serving.registry import Version
    from offsite_ray.serving.requests import Piece

    Fetch = Callable[[int], AsyncIterator[tuple[str, bytes]]]
    """Yields the files of a version's adapter bundle, part by part."""

_LOG = logging.getLogger(__name__)

POLL_S = 0.5
"""How often it is asked whether something else is served now."""
_GRACE_S = 15.0
"""Longer than it takes an ingress to hear of another version."""
_AGAIN_S = 10.0
"""After which a version that could not be brought is tried again."""
_AT_ONCE = 4
"""Versions that are fetched at a time, so that one that comes slowly keeps no other waiting."""
_COMING_S = 20.0
"""How long a request waits for a version that is not here yet."""


@dataclass(slots=True, eq=False)
class _Answer:
    """Pieces on their way from the engine's thread to who waits for them on the event loop."""

    loop: asyncio.AbstractEventLoop
    left: int
    """Of the texts, those that are not at their end."""
    pieces: deque[Piece] = field(default_factory=deque)
    there: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, piece: Piece) -> None:
        """Take a piece; called by the engine's thread."""
        self.pieces.append(piece)
        self.loop.call_soon_threadsafe(self.there.set)

    async def take(self) -> list[Piece]:
        """Wait for at least one piece, and return all that are there."""
        found: list[Piece] = []
        while not found:
            await self.there.wait()
            self.there.clear()
            while self.pieces:
                found.append(self.pieces.popleft())
        self.left -= sum(piece.finish is not None for piece in found)
        return found


class Replica:
    """Answers requests; follows what the store says is served."""

    def __init__(
        self, engine: Engine, full: FullModel, meters: Meters, request_timeout: float
    ) -> None:
        """Take an engine that runs.

        Args:
            engine: Of the full model.
            full: The same, on disk.
            meters: What is measured goes there.
            request_timeout: Seconds that a request may take. So long a version that was replaced
                is kept: of a request with many prompts the last may come to it as late.
        """
        self._kept_s = _GRACE_S + request_timeout
        self.engine, self._full, self._meters = engine, full, meters
        self._revision: int | None = None
        self._known: dict[int, Version] = {}
        self._coming: dict[int, asyncio.Task[None]] = {}
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._leaving: dict[int, float] = {}
        self._failed: dict[int, tuple[str, float]] = {}
        """Why a version could not be brought, and when."""
        self._changed = asyncio.Condition()

    async def follow(self, records: Records, fetch: Fetch) -> None:
        """Keep the tenants as the store has them, for ever; what fails is tried again.

        Args:
            records: The store.
            fetch: Gets the adapter bundle of a version.
        """
        while True:
            try:
                await self.follow_once(records, fetch)
                self._meters.look(self.engine)
            except Exception as error:
                # The store may be starting again; what is here is served meanwhile.
                _LOG.warning("cannot ask what is served: %s", error)
            await asyncio.sleep(POLL_S)

    async def follow_once(self, records: Records, fetch: Fetch) -> None:
        """Take over what is served now; new versions come meanwhile."""
        snapshot = await records.snapshot(self._revision)
        if snapshot is not None:
            wanted = {version.number: version for version in snapshot.tenants.values()}
            for number, version in wanted.items():
                self._leaving.pop(number, None)
                pinned = version.tenant in snapshot.pinned
                if number in self._known:
                    self.engine.residency.pin(number, pinned=pinned)
                elif number not in self._coming:
                    task = asyncio.create_task(self._bring(version, fetch, pinned=pinned))
                    task.add_done_callback(partial(self._coming.pop, number))
                    self._coming[number] = task
            for number in self._known.keys() - wanted.keys():
                self._leaving.setdefault(number, time.monotonic())
            # What is on its way, or could not be brought, is asked for again.
            settled = not self._coming and wanted.keys() <= self._known.keys()
            self._revision = snapshot.revision if settled else None
        for number, since in list(self._leaving.items()):
            if time.monotonic() - since > self._kept_s:
                version = self._known.pop(number)
                del self._leaving[number]
                self.engine.residency.remove(number, self.engine.do)
                _LOG.info("%s version %d is served no more", version.tenant, number)

    async def settle(self) -> None:
        """Wait for the versions that are on their way."""
        await asyncio.gather(*self._coming.values())

    async def _bring(self, version: Version, fetch: Fetch, *, pinned: bool) -> None:
        """Fetch, verify and add a version, unless that failed a moment ago."""
        number = version.number
        said, when = self._failed.get(number, ("", -_AGAIN_S))
        if time.monotonic() - when < _AGAIN_S:
            return
        try:
            async with self._places:
                own = await self._fetched(number, fetch)
        except Exception as error:
            if said != str(error):
                _LOG.error("%s version %d is not served: %s", version.tenant, number, error)
            self._failed[number] = (str(error), time.monotonic())
            return
        self._failed.pop(number, None)
        self.engine.residency.add(number, own, pinned=pinned)
        async with self._changed:
            self._known[number] = version
            self._changed.notify_all()
        self._meters.loaded(version.tenant)
        _LOG.info("%s version %d (%s) is served", version.tenant, number, version.method)

    async def _fetched(self, number: int, fetch: Fetch) -> Own:
        with tempfile.TemporaryDirectory(prefix="offsite-ray-") as scratch:
            directory = Path(scratch)
            async for name, part in fetch(number):
                await asyncio.to_thread(_append, directory / name, part)
            return await asyncio.to_thread(read_own, directory, self._full)

    async def complete(self, ask: Ask) -> list[Piece]:
        """Return the whole answer; raises what :meth:`stream` raises."""
        return [piece async for pieces in self.stream(ask) for piece in pieces]

    async def stream(self, ask: Ask) -> AsyncGenerator[Sequence[Piece]]:
        """Yield the answer as it grows; ends the work when nobody listens any more.

        Raises:
            RequestError: It cannot be answered.
            LostError: It cannot be answered here, for now.
            BusyError: Too many wait already.
        """
        await self._wait_for(ask.version)
        answer = _Answer(asyncio.get_running_loop(), ask.sampling.n)
        request = Request(
            id=ask.id,
            tenant=ask.version,
            prompt=ask.prompt,
            sampling=ask.sampling,
            tell=answer.tell,
        )
        with self._meters.watch(ask) as watch:
            self.engine.submit(request)
            try:
                while answer.left > 0:
                    pieces = await answer.take()
                    watch.told(pieces)
                    yield pieces
            finally:
                if answer.left > 0:
                    self.engine.cancel(request)

    async def _wait_for(self, number: int) -> None:
        """Wait for a version that an ingress has heard of earlier than this replica."""
        if number == BASE or number in self._known:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_COMING_S), self._changed:
                await self._changed.wait_for(lambda: number in self._known)
        if number not in self._known:
            raise LostError("this version of the model is not served here yet; ask again")


def _append(path: Path, part: bytes) -> None:
    with path.open("ab") as file:
        file.write(part)
