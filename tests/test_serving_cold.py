# SPDX-License-Identifier: Apache-2.0
"""A tenant that is on its way keeps no other waiting, and is answered once it is there."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.config import ApplicationConfig
from offsite_ray.emulator import open_full_model
from offsite_ray.serving.asks import Ask
from offsite_ray.serving.meters import Meters
from offsite_ray.serving.own import Own
from offsite_ray.serving.replica import Replica
from offsite_ray.serving.requests import Sampling
from offsite_ray.serving.store import Store
from offsite_ray.serving.tenants import read_own
from tests.deployed import archive
from tests.served import Tenants, ask, generated, make_tenants, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from offsite_ray.serving.registry import Snapshot, Version
    from offsite_ray.serving.requests import Piece

PROMPT = (5, 9, 60, 31)
NUM_TOKENS = 5


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return make_tenants("gpt2", tmp_path_factory.mktemp("tenants"), ("full", "lora", "bitfit"))


def test_the_engine_answers_while_a_tenant_is_copied(
    tenants: Tenants, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold, copy = read_own(tenants.adapters["full"], open_full_model(tenants.full)), Own.to
    begun, go_on = threading.Event(), threading.Event()

    def slow(self: Own, *where: Any) -> Own:
        if self is cold:
            begun.set()
            assert go_on.wait(60)
        return copy(self, *where)

    monkeypatch.setattr(Own, "to", slow)
    engine, numbers = serve(tenants)
    wish: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    try:
        assert ask(engine, numbers["lora"], PROMPT, **wish).done.wait(30)
        engine.residency.add(99, cold)
        waits = ask(engine, 99, PROMPT, **wish)
        assert begun.wait(30)
        # One that is in the model already, and one that has to be brought too.
        for name in ("lora", "bitfit"):
            other = ask(engine, numbers[name], PROMPT, **wish)
            assert other.done.wait(30), name
            assert other.tokens() == generated(tenants.plugged_in[name], PROMPT, NUM_TOKENS)
        assert not waits.pieces
        go_on.set()
        assert waits.done.wait(30)
        assert waits.tokens() == generated(tenants.plugged_in["full"], PROMPT, NUM_TOKENS)
    finally:
        go_on.set()
        engine.stop()


class Records:
    """The store, without Serve between."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def snapshot(self, revision: int | None) -> Snapshot | None:
        return await asyncio.to_thread(self._store.snapshot, revision)

    async def call(self, method: str, *given: Any, **named: Any) -> Any:
        return await asyncio.to_thread(self._store.call, method, *given, **named)

    async def parts(self, number: int) -> AsyncIterator[tuple[str, bytes]]:
        parts = self._store.parts(number)
        while (part := await asyncio.to_thread(next, parts, None)) is not None:
            yield part

    async def upload(self, name: str, adapter: Path) -> Version:
        upload = await self.call("begin_upload")
        await self.call("add_part", upload, archive(adapter))
        version: Version = await self.call("finish_upload", upload, name)
        return version


def wish(version: Version) -> Ask:
    sampling = Sampling(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    return Ask(
        id="x", model=version.tenant, version=version.number, prompt=PROMPT, sampling=sampling
    )


def tokens(pieces: Sequence[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


def test_a_replica_answers_while_a_version_is_fetched(tenants: Tenants, tmp_path: Path) -> None:
    config = ApplicationConfig(
        model=str(tenants.full),
        adapter=(f"lora={tenants.adapters['lora']}",),
        state=str(tmp_path / "state"),
    )
    store = Store(config)
    records, (engine, _) = (
        Records(store),
        serve(Tenants(full=tenants.full, adapters={}, plugged_in={})),
    )

    async def talk() -> dict[str, list[int]]:
        replica = Replica(engine, open_full_model(tenants.full), Meters(), 60.0)
        await replica.follow_once(records, records.parts)
        await replica.settle()
        slow = await records.upload("full", tenants.adapters["full"])
        file = store.registry.bundles / f"{slow.number}" / "adapter.safetensors"
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)  # whoever reads it waits for who writes
        following = asyncio.ensure_future(replica.follow(records, records.parts))
        waits = asyncio.ensure_future(replica.complete(wish(slow)))
        said = {}
        try:
            for name in ("lora", "bitfit"):
                if name == "bitfit":  # comes while the other is on its way
                    await records.upload(name, tenants.adapters[name])
                version = store.registry.snapshot().tenants[name]
                said[name] = tokens(await replica.complete(wish(version)))
            assert not waits.done()
        finally:
            await asyncio.to_thread(file.write_bytes, content)
        said["full"] = tokens(await waits)
        following.cancel()
        return said

    try:
        said = asyncio.run(talk())
    finally:
        engine.stop()
    assert said == {
        name: generated(tenants.plugged_in[name], PROMPT, NUM_TOKENS)
        for name in ("lora", "bitfit", "full")
    }
