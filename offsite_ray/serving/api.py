# SPDX-License-Identifier: Apache-2.0
"""The HTTP interface: OpenAI's routes, the administrator's, and the pages, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from offsite_ray import __version__
from offsite_ray.serving.admin_api import admin_routes
from offsite_ray.serving.completions import completion_routes
from offsite_ray.serving.door import Door
from offsite_ray.serving.pages import playground
from offsite_ray.serving.protocol import ErrorObject

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI, Request, Response

    from offsite_ray.serving.front import Front


def create_api(front: Front) -> FastAPI:
    """Return the application."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(front.follow())
        # Serve sends no request before: on a rolling update they wait, and are not turned away.
        await front.opened()
        yield
        following.cancel()

    api = FastAPIOffline(
        title="offsite-ray",
        version=__version__,
        description=(
            "Plugged-in models of many tenants, behind OpenAI's protocol. Give the key that you "
            "were given as `Authorization: Bearer KEY`."
        ),
        redoc_url=None,
        lifespan=lifespan,
        responses={"4XX": {"model": ErrorObject, "description": "Refused, with the reason"}},
    )
    api.include_router(completion_routes(front))
    api.include_router(admin_routes(front))

    @api.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(playground(), headers={"Cache-Control": "no-cache"})

    @api.get("/health", tags=["service"])
    async def health() -> dict[str, str]:
        """Say whether requests can be answered; needs no key."""
        _ = front.gate
        await front.check_engines()
        return {"status": "ok"}

    for own in (HTTPException, RequestValidationError):
        api.add_exception_handler(own, _passed_on)
    api.add_middleware(Door, front=front)
    return api


async def _passed_on(_: Request, error: Exception) -> Response:
    """Leave an error to the door; FastAPI would answer it in a form of its own."""
    raise error
