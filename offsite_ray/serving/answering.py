# SPDX-License-Identifier: Apache-2.0
"""Answers of the replicas to the prompts of one request, whatever becomes of a replica."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from offsite_ray.errors import BusyError, LostError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from offsite_ray.serving.asks import Ask, Engines
    from offsite_ray.serving.requests import Piece

_T = TypeVar("_T")

_LOG = logging.getLogger("ray.serve")

_ATTEMPTS = 4
"""At a request whose replica was lost before anything of the answer was passed on."""
_AT_ONCE = 8
"""Prompts of one request that are answered at a time, so that it does not take every place."""
_PAUSE_S = 0.5
"""Before the next of them, twice as long each time; and between two tries for a place."""


async def whole(engines: Engines, asks: Sequence[Ask]) -> list[Sequence[Piece]]:
    """Return the answers to some prompts; if one cannot be had, the others are given up.

    Raises:
        BusyError: There was no place for any of them.
        OffsiteError: What was raised for one of them.
    """
    places = _Places()
    tasks = [asyncio.ensure_future(places.have(partial(_complete, engines, ask))) for ask in asks]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def growing(
    engines: Engines, asks: Sequence[Ask]
) -> AsyncGenerator[tuple[int, Sequence[Piece]]]:
    """Yield the answers to some prompts as they grow: which prompt, and what is new.

    Raises:
        BusyError: There was no place for any of them.
        OffsiteError: What was raised for one of them.
    """
    if len(asks) == 1:
        async with contextlib.aclosing(_stream(engines, asks[0])) as stream:
            async for pieces in stream:
                yield 0, pieces
        return
    places = _Places()
    news: asyncio.Queue[tuple[int, Sequence[Piece]] | None] = asyncio.Queue()

    async def pass_on(place: int, ask: Ask) -> None:
        async for pieces in _stream(engines, ask):
            news.put_nowait((place, pieces))

    async def follow(place: int, ask: Ask) -> None:
        try:
            await places.have(partial(pass_on, place, ask))
        finally:
            news.put_nowait(None)

    tasks = [asyncio.ensure_future(follow(place, ask)) for place, ask in enumerate(asks)]
    try:
        left = len(tasks)
        while left:
            new = await news.get()
            if new is not None:
                yield new
                continue
            left -= 1
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        await _end(tasks)


class _Places:
    """Where the prompts of one request are answered, some at a time.

    A prompt that there is no place for tries again as long as another of them has one, or has had
    it: what is computed is not thrown away for those that come late.
    """

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(_AT_ONCE)
        self._had = 0
        """Prompts with a place, or an answer, or that are just asking."""

    async def have(self, answer: Callable[[], Awaitable[_T]]) -> _T:
        """Return the answer to a prompt; raise :class:`BusyError` where none has a place."""
        async with self._free:
            while True:
                self._had += 1
                try:
                    return await answer()
                except BusyError:
                    self._had -= 1
                    if not self._had:
                        raise
                await asyncio.sleep(_PAUSE_S)


async def _complete(engines: Engines, ask: Ask) -> Sequence[Piece]:
    """Return a whole answer; nothing was passed on before, so a lost one may begin again."""
    for attempt in range(_ATTEMPTS):
        try:
            return _checked(await engines.complete(ask))
        except LostError as error:
            await _pause(ask, attempt, error)
    raise AssertionError  # the last attempt raised


async def _stream(engines: Engines, ask: Ask) -> AsyncGenerator[Sequence[Piece]]:
    """Yield an answer; begins again as long as nothing of it was passed on."""
    for attempt in range(_ATTEMPTS):
        begun = False
        try:
            async for pieces in engines.stream(ask):
                _checked(pieces)
                begun = True
                yield pieces
            return
        except LostError as error:
            if begun:
                raise
            await _pause(ask, attempt, error)


def _checked(pieces: Sequence[Piece]) -> Sequence[Piece]:
    """Refuse an answer that its engine did not give.

    Raises:
        LostError: It failed; another may not.
        BusyError: Somebody else has the place.
    """
    for piece in pieces:
        if piece.finish == "busy":
            raise BusyError(str(piece.error))
        if piece.finish == "error":
            raise LostError(piece.error or "the engine failed")
    return pieces


async def _pause(ask: Ask, attempt: int, error: LostError) -> None:
    """Wait before the next attempt, or raise the error where there is none."""
    if attempt == _ATTEMPTS - 1:
        raise error
    _LOG.warning("request %s begins again: %s", ask.id, error)
    await asyncio.sleep(_PAUSE_S * 2**attempt)


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
