# SPDX-License-Identifier: Apache-2.0
"""Refusing at the ingress what the engines would refuse, while they have no place for a tenant."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from offsite_ray.errors import BusyError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

    from offsite_ray.serving.asks import Ask, Engines
    from offsite_ray.serving.requests import Piece

MOMENT_S = 0.25
"""How long a refusal holds, unless an answer of the tenant ends before: a place that others leave
stays free as long at most."""


class Refusing:
    """Engines that are not asked again for a moment after they had no place.

    A crowd that comes again and again would take the cores that the answers need. It is the tenant
    that is refused: others may still have a place.
    """

    def __init__(self, engines: Engines, told: Callable[[str], None]) -> None:
        """Stand before some engines.

        Args:
            engines: Those that would refuse.
            told: Given the model of what they were not even asked.
        """
        self._engines, self._told = engines, told
        self._refused: dict[int, tuple[float, BusyError]] = {}
        """By version: until when, and what the engine said."""

    async def complete(self, ask: Ask) -> Sequence[Piece]:
        """Return the whole answer; raises what the engines raise."""
        with self._place(ask):
            return await self._engines.complete(ask)

    async def stream(self, ask: Ask) -> AsyncGenerator[Sequence[Piece]]:
        """Yield the answer as it grows; raises what the engines raise."""
        with self._place(ask):
            async with contextlib.aclosing(self._engines.stream(ask)) as stream:
                async for pieces in stream:
                    yield pieces

    async def check(self) -> None:
        """Raise :class:`LostError` where none of them can answer."""
        await self._engines.check()

    @contextlib.contextmanager
    def _place(self, ask: Ask) -> Iterator[None]:
        until, said = self._refused.get(ask.version, (0.0, BusyError()))
        if time.monotonic() < until:
            self._told(ask.model)
            raise BusyError(str(said))
        try:
            yield
        except BusyError as error:
            self._refused[ask.version] = (time.monotonic() + MOMENT_S, error)
            raise
        self._refused.pop(ask.version, None)
