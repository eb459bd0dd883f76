# SPDX-License-Identifier: Apache-2.0
"""What every route needs: who calls and what they may do, who answers, and what is served now."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from fastapi import Depends
from fastapi.security import HTTPBearer

from offsite_ray.errors import BusyError
from offsite_ray.serving.access import Gate
from offsite_ray.serving.replica import POLL_S

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from offsite_ray.config import ApplicationConfig
    from offsite_ray.serving.asks import Engines, Records

_LOG = logging.getLogger("ray.serve")

_CHECKED_S = 1.0
"""For which it is known whether an engine can answer, however often somebody asks."""

TAKES_A_KEY = Depends(HTTPBearer(auto_error=False, description="The key that you were given"))
"""Of routes, so that the page of the interface asks for one; it is the door that looks at it."""


class Front:
    """What the routes need: who may do what, and who answers."""

    def __init__(
        self,
        config: ApplicationConfig,
        engines: Engines,
        records: Records,
        tokenizer: PreTrainedTokenizerBase,
        max_positions: int,
    ) -> None:
        """Take what there is; nobody is let in before :meth:`refresh`.

        Args:
            config: Of the application.
            engines: The replicas.
            records: The store.
            tokenizer: Of the full model.
            max_positions: Tokens that a prompt and its answer may have together.
        """
        self.config, self.engines, self.records = config, engines, records
        self.tokenizer, self.max_positions = tokenizer, max_positions
        self._gate: Gate | None = None
        self._opened = asyncio.Event()
        self._check: asyncio.Future[None] | None = None
        self._checked = 0.0

    async def refresh(self) -> None:
        """Take over what is served now, and who may use it."""
        revision = None if self._gate is None else self._gate.snapshot.revision
        snapshot = await self.records.snapshot(revision)
        if snapshot is None:
            return
        if self._gate is None:
            self._gate = Gate(snapshot=snapshot, base=self.config.full_model_name)
            self._opened.set()
        elif snapshot.revision > self._gate.snapshot.revision:  # not one that was overtaken
            self._gate.snapshot = snapshot

    async def change(self, method: str, *given: Any, **named: Any) -> Any:
        """Have the store change something, and know of it here at once."""
        result = await self.records.call(method, *given, **named)
        await self.refresh()
        return result

    async def check_engines(self) -> None:
        """Raise :class:`LostError` where no engine can answer; they are asked once a second."""
        now = time.monotonic()
        if self._check is None or (self._check.done() and now - self._checked > _CHECKED_S):
            self._check, self._checked = asyncio.ensure_future(self.engines.check()), now
        await asyncio.shield(self._check)

    async def follow(self) -> None:
        """Refresh for ever; what was known last counts while the store cannot be asked."""
        while True:
            try:
                await self.refresh()
            except Exception as error:
                _LOG.warning("cannot ask what is served: %s", error)
            await asyncio.sleep(POLL_S)

    async def opened(self) -> None:
        """Wait until somebody can be let in."""
        await self._opened.wait()

    @property
    def gate(self) -> Gate:
        """Who may do what; raises :class:`BusyError` before the store has said it."""
        if self._gate is None:
            raise BusyError("the service is about to start; ask again in a moment")
        return self._gate
