# SPDX-License-Identifier: Apache-2.0
"""The HTTP interface: OpenAI's routes, the administrator's, and the pages, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from offsite_ray import __version__
from offsite_ray.errors import OffsiteError
from offsite_ray.serving.admin_api import admin_routes
from offsite_ray.serving.completions import completion_routes
from offsite_ray.serving.door import Door
from offsite_ray.serving.failures import Failure, failure_of, refusal
from offsite_ray.serving.pages import playground

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI, Request

    from offsite_ray.serving.front import Front


def create_api(front: Front) -> FastAPI:
    """Return the application."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(front.follow())
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
        return {"status": "ok"}

    _tell_failures(api)
    api.add_middleware(Door, front=front)
    return api


def _tell_failures(api: FastAPI) -> None:
    """Have every error be an object that OpenAI's clients read."""

    def answer(request: Request, failure: Failure) -> JSONResponse:
        request.state.failure = failure.body["error"]["message"]
        return JSONResponse(failure.body, failure.status, dict(failure.headers))

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return answer(request, failure_of(error))

    async def form(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        return answer(request, refusal(message, param=where or None))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        where = f"{request.method} {request.url.path}"
        return answer(request, refusal(f"{where}: {error.detail}", status=error.status_code))

    api.add_exception_handler(RequestValidationError, form)
    api.add_exception_handler(HTTPException, http)
    api.add_exception_handler(OffsiteError, ours)
    api.add_exception_handler(TimeoutError, ours)
