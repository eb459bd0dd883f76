# SPDX-License-Identifier: Apache-2.0
"""What every request passes first and last: its id, who sent it, how much it brings, the log."""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from offsite_ray.serving.failures import failure_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from offsite_ray.serving.front import Front

_LOG = logging.getLogger("ray.serve")

_MAX_BODY = 4 << 20
"""Bytes of a request, but for uploads, which count their own."""
_MAX_ID = 64
_CLOSED = ("/v1/", "/admin/")
"""What takes a key."""


@dataclass(kw_only=True, slots=True)
class _Visit:
    """A request on its way through."""

    state: dict[str, Any]
    began: float = field(default_factory=time.monotonic)
    status: int | None = None
    """Of the answer, once it has begun."""
    taken: int = 0
    """Bytes of the body so far."""


class Door:
    """The outermost layer of the application, where every error becomes an answer.

    Without a key not even a body is read.
    """

    def __init__(self, app: ASGIApp, front: Front) -> None:
        """Stand before an application."""
        self._app, self._front = app, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        visit = _Visit(state=scope.setdefault("state", {}))
        # Serve's proxy makes an id where the client has none, and tells it in the answer.
        visit.state["id"] = request.headers.get("x-request-id", "")[:_MAX_ID] or uuid.uuid4().hex

        is_upload = scope["method"] == "PUT" and _route(scope).startswith("/admin/models/")

        async def limited() -> Message:
            message = await receive()
            visit.taken += len(message.get("body", b""))
            if visit.taken > _MAX_BODY and not is_upload:
                raise HTTPException(413, f"a request may have {_MAX_BODY} bytes")
            return message

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
            await send(message)

        try:
            self._identify(request)
            await self._app(scope, limited, noted)
        except Exception as error:
            failure = failure_of(error, f"{request.method} {request.url.path}")
            if failure.status == 500:
                _LOG.exception("request %s failed", visit.state["id"])
            if visit.status is not None:
                raise  # too late to say anything but that it has ended
            visit.state["failure"] = failure.body["error"]["message"]
            response = JSONResponse(failure.body, failure.status, dict(failure.headers))
            await response(scope, receive, noted)
        finally:
            _log(request, visit)

    def _identify(self, request: Request) -> None:
        """Find out who calls.

        Raises:
            DeniedError: Nobody whom there is a key of.
            RateError: The key has sent too much.
        """
        if not _route(request.scope).startswith(_CLOSED):
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else None
        # First who it is: of a key that has sent too much, the log says whose it is.
        request.state.key = self._front.gate.key(given).label
        request.state.caller = self._front.gate.bearer(given)


def _route(scope: Scope) -> str:
    """Return the path behind the prefix under which Serve has the application."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _log(request: Request, visit: _Visit) -> None:
    """Write a line about a request that has ended; no text of it."""
    facts = {
        "request": visit.state["id"],
        "method": request.method,
        "path": request.url.path,
        "status": visit.status,
        "seconds": round(time.monotonic() - visit.began, 4),
        "key": visit.state.get("key"),
        "model": visit.state.get("model"),
        "error": visit.state.get("failure"),
    }
    said = " ".join(f"{name}={value!r}" for name, value in facts.items() if value is not None)
    _LOG.info(said, extra={"offsite_ray": facts})
