# SPDX-License-Identifier: Apache-2.0
"""Refusals that the ingress gives itself, before a real engine whose places are taken."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from offsite_ray.config import ApplicationConfig, Limits
from offsite_ray.emulator import open_full_model
from offsite_ray.errors import BusyError
from offsite_ray.serving import refusing
from offsite_ray.serving.asks import Ask
from offsite_ray.serving.meters import Meters
from offsite_ray.serving.refusing import Refusing
from offsite_ray.serving.replica import Replica
from offsite_ray.serving.requests import Sampling
from offsite_ray.serving.routing import BASE
from offsite_ray.serving.store import Store
from tests.served import Tenants, ask, make_tenants, serve
from tests.test_serving_cold import Records

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offsite_ray.serving.requests import Piece


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return make_tenants("gpt2", tmp_path_factory.mktemp("refusing"), ["lora"])


PROMPT = (5, 9, 60, 31)


class Near(Replica):
    """A replica without Serve between, and how often it was asked."""

    asked = 0

    async def complete(self, ask: Ask) -> list[Piece]:
        self.asked += 1
        return await super().complete(ask)

    async def check(self) -> None:
        raise NotImplementedError


def wish(version: int) -> Ask:
    sampling = Sampling(max_tokens=2, temperature=0, ignore_eos=True)
    return Ask(id="x", model="m", version=version, prompt=PROMPT, sampling=sampling)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("moment", [600.0, 0.0])
def test_a_refusal_holds_for_a_moment_and_for_its_tenant_alone(
    moment: float, tenants: Tenants, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusing, "MOMENT_S", moment)
    adapter = f"lora={tenants.adapters['lora']}"
    config = ApplicationConfig(
        model=str(tenants.full), adapter=(adapter,), state=str(tmp_path / "state")
    )
    store = Store(config)
    records, number = Records(store), store.registry.snapshot().tenants["lora"].number
    nobody = Tenants(full=tenants.full, adapters={}, plugged_in={})
    engine, _ = serve(nobody, Limits(max_rows=1, max_queue=2, cache_tokens=512))

    go_on = threading.Event()

    async def talk() -> None:
        replica = Near(engine, open_full_model(tenants.full), Meters(), 60.0)
        await replica.follow_once(records, records.parts)
        await replica.settle()
        refused: list[str] = []
        engines = Refusing(replica, refused.append)
        # The engine's thread waits with the first piece, and the only row is taken.
        first = ask(engine, BASE, PROMPT, at_piece=go_on.wait, max_tokens=2)
        await until(lambda: engine.num_running == 1)
        crowd = [asyncio.ensure_future(engines.complete(wish(BASE))) for _ in range(2)]
        await until(lambda: engine.num_waiting == 2)
        for _ in range(2):
            with pytest.raises(BusyError, match="all places are taken"):
                await engines.complete(wish(BASE))
        assert replica.asked == (3 if moment else 4)
        assert refused == (["m"] if moment else [])
        # Of the two that wait, one gives its place to a tenant of whom nobody does.
        other = asyncio.ensure_future(engines.complete(wish(number)))
        await asyncio.sleep(0.1)
        go_on.set()
        assert [piece.finish for piece in await other][-1] == "length"
        ends = [[piece.finish for piece in await one][-1] for one in crowd]
        assert sorted(map(str, ends)) == ["busy", "length"]
        assert first.done.wait(30)
        # Where an answer has ended, there is a place again: after the step that ended it.
        await until(lambda: engine.num_running == 0)
        assert await engines.complete(wish(BASE))

    try:
        asyncio.run(talk())
    finally:
        go_on.set()
        engine.stop()
