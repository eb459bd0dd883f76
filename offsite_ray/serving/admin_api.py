# SPDX-License-Identifier: Apache-2.0
"""The administrator's routes: models and their versions, keys."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from offsite_ray.serving.front import TAKES_A_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from offsite_ray.serving.front import Front
    from offsite_ray.serving.registry import Version

_PART_BYTES = 4 << 20
Names = Annotated[list[Annotated[str, Field(max_length=200)]], Field(fail_fast=True)]


class NewKey(BaseModel):
    """A key that is to be made."""

    model_config = ConfigDict(extra="forbid")

    label: Annotated[str, Field(min_length=1, max_length=100, pattern="^[^/]*$")]
    """By which people know it."""
    models: Names = []
    """That it may see and use."""
    admin: bool = False
    per_minute: Annotated[int | None, Field(ge=1)] = None
    """Requests that may be sent with it in a minute; by default as many as one likes."""


class Models(BaseModel):
    """Models that a key may see and use."""

    model_config = ConfigDict(extra="forbid")

    models: Names


def admin_routes(front: Front) -> APIRouter:
    """Return the routes."""

    async def admin(request: Request) -> None:
        front.gate.admin(request.state.caller)

    router = APIRouter(
        prefix="/admin", tags=["administrator"], dependencies=[TAKES_A_KEY, Depends(admin)]
    )
    router.include_router(_model_routes(front))
    router.include_router(_key_routes(front))
    return router


def _model_routes(front: Front) -> APIRouter:
    router = APIRouter()

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """List the models, each with its versions, the newest first."""
        snapshot = front.gate.snapshot
        return {
            name: {
                "current": version.number,
                "pinned": name in snapshot.pinned,
                "versions": [_shown(v) for v in await front.records.call("versions", name)],
            }
            for name, version in sorted(snapshot.tenants.items())
        }

    @router.put("/models/{name}", openapi_extra=_TAR)
    async def upload(name: str, request: Request) -> dict[str, Any]:
        """Verify an adapter bundle and serve it; the body is a tar archive, not compressed.

        The version before goes on to be served to the requests that it has begun.
        """
        async with _uploaded(front, request) as upload:
            return _shown(await front.change("finish_upload", upload, name))

    @router.delete("/models/{name}")
    async def remove(name: str) -> dict[str, Any]:
        """Serve a model no more, and forget its versions."""
        await front.change("remove", name)
        return {"removed": name}

    @router.post("/models/{name}/rollback")
    async def roll_back(name: str) -> dict[str, Any]:
        """Serve the version before the current one, which is forgotten."""
        return _shown(await front.change("roll_back", name))

    @router.put("/models/{name}/pin")
    async def pin(name: str) -> dict[str, Any]:
        """Have a model stay on the device once it is there."""
        await front.change("pin", name, pinned=True)
        return {"pinned": name}

    @router.delete("/models/{name}/pin")
    async def unpin(name: str) -> dict[str, Any]:
        """Let a model leave the device when others need the room."""
        await front.change("pin", name, pinned=False)
        return {"unpinned": name}

    return router


@contextlib.asynccontextmanager
async def _uploaded(front: Front, request: Request) -> AsyncIterator[str]:
    """Send the body of a request to the store; give the name of that upload, and end it."""
    upload = await front.records.call("begin_upload")
    try:
        parts = bytearray()
        async for part in request.stream():
            parts += part
            if len(parts) >= _PART_BYTES:
                await front.records.call("add_part", upload, bytes(parts))
                parts.clear()
        await front.records.call("add_part", upload, bytes(parts))
        yield upload
    finally:
        await front.records.call("forget_upload", upload)


def _key_routes(front: Front) -> APIRouter:
    router = APIRouter()

    @router.get("/keys")
    async def keys() -> list[dict[str, Any]]:
        """List the keys by label; the keys themselves are not kept."""
        found = sorted(front.gate.snapshot.keys.values(), key=lambda key: key.label)
        return [{**dataclasses.asdict(key), "models": sorted(key.models)} for key in found]

    @router.post("/keys")
    async def add_key(asked: NewKey) -> dict[str, Any]:
        """Make a key; it is told this once."""
        key = await front.change("add_key", **asked.model_dump())
        return {"label": asked.label, "key": key, **_unknown(front, asked.models)}

    @router.put("/keys/{label}/models")
    async def grant(label: str, asked: Models) -> dict[str, Any]:
        """Say which models a key may see and use from now on."""
        await front.change("grant", label, asked.models)
        return {"label": label, "models": sorted(asked.models), **_unknown(front, asked.models)}

    @router.delete("/keys/{label}")
    async def remove_key(label: str) -> dict[str, str]:
        """Have a key open nothing any more."""
        await front.change("remove_key", label)
        return {"removed": label}

    return router


_TAR = {"requestBody": {"content": {"application/x-tar": {"schema": {"type": "string"}}}}}


def _unknown(front: Front, models: Sequence[str]) -> dict[str, list[str]]:
    """Name the models that there are not, if any; they may still come."""
    served = {*front.gate.snapshot.tenants, front.gate.base}
    unknown = sorted({*models} - served)
    return {"unknown_models": unknown} if unknown else {}


def _shown(version: Version) -> dict[str, Any]:
    """Return a version as clients see it: where it lies is nobody's business."""
    shown = dataclasses.asdict(version)
    del shown["path"]
    return shown
