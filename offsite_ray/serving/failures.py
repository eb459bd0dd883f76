# SPDX-License-Identifier: Apache-2.0
"""What went wrong, as HTTP and OpenAI's clients are told; a row an error."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from offsite_ray.errors import (
    BundleError,
    BusyError,
    ConfigError,
    FamilyError,
    LostError,
    MissingError,
    OffsiteError,
    RegistryError,
    RequestError,
    StorageError,
    did_you_mean,
)
from offsite_ray.serving.access import DeniedError, ForbiddenError, RateError, UnknownModelError
from offsite_ray.serving.protocol import FIELDS, error_object

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class _Row:
    error: type[BaseException]
    status: int
    kind: str
    code: str | None = None


_INVALID = "invalid_request_error"
# The first that fits counts.
_ROWS = (
    _Row(DeniedError, 401, _INVALID, "invalid_api_key"),
    _Row(ForbiddenError, 403, "permission_error", "not_allowed"),
    _Row(UnknownModelError, 404, _INVALID, "model_not_found"),
    _Row(RateError, 429, "rate_limit_error", "rate_limit_exceeded"),
    _Row(BusyError, 429, "server_busy", "server_busy"),
    _Row(RequestError, 400, _INVALID),
    _Row(ConfigError, 400, _INVALID),
    _Row(MissingError, 404, _INVALID, "not_found"),
    _Row(RegistryError, 409, _INVALID, "conflict"),
    _Row(BundleError, 422, _INVALID, "bundle_refused"),
    _Row(FamilyError, 422, _INVALID, "bundle_refused"),
    _Row(StorageError, 507, "server_error", "no_storage"),
    _Row(LostError, 503, "server_error", "replica_lost"),
    _Row(TimeoutError, 504, "server_error", "timeout"),
    _Row(Exception, 500, "server_error", "internal_error"),
)

_BUSY_S = 1.0
"""After which somebody who was not let in may try again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An answer that says what went wrong."""

    status: int
    body: dict[str, Any]
    headers: Mapping[str, str]


def failure_of(error: BaseException, where: str = "") -> Failure:
    """Return what a client is told of an error; of what is our own fault, no more than that.

    Args:
        error: What was raised.
        where: Method and path, for what has no other words than HTTP's.
    """
    if isinstance(error, HTTPException):
        return _refusal(f"{where}: {error.detail}", status=error.status_code)
    if isinstance(error, RequestValidationError):
        field, words = _what_is_wrong(error)
        return _refusal(f"{field}: {words}" if field else words, param=field or None)
    row = next(row for row in _ROWS if isinstance(error, row.error))
    message, headers = str(error), {}
    if isinstance(error, TimeoutError):
        message = "the answer took too long; ask for fewer tokens, or again in a moment"
    elif not isinstance(error, OffsiteError):
        message = "something went wrong here; the request id finds it in the logs"
    if row.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if row.status == 429:
        wait = error.retry_after_s if isinstance(error, RateError) else _BUSY_S
        headers["Retry-After"] = str(math.ceil(wait))
    param = error.parameter if isinstance(error, RequestError) else None
    return Failure(
        status=row.status,
        body=error_object(message, row.kind, param=param, code=row.code),
        headers=headers,
    )


def _what_is_wrong(error: RequestValidationError) -> tuple[str, str]:
    """Return the field that is wrong and what is: of all that a value may be, the nearest."""
    nearest = max(
        error.errors(), key=lambda one: (len(one["loc"]), not one["type"].endswith("_type"))
    )
    if nearest["type"] == "json_invalid":
        return (
            "",
            f"the body is no JSON: {nearest['ctx']['error']}, at character {nearest['loc'][-1]}",
        )
    if nearest["loc"] == ("body",):
        return "", "the body must be a JSON object; send it with Content-Type: application/json"
    places = [str(part) for part in nearest["loc"] if part != "body"]
    words = nearest["msg"]
    if nearest["type"] == "extra_forbidden":
        words = f"there is no such field{did_you_mean(places[-1], FIELDS)}"
    # Where a value may be of several types, their names stand between those of the fields.
    return ".".join(place for place in places if re.fullmatch(r"\w+", place)), words


def _refusal(message: str, *, param: str | None = None, status: int = 400) -> Failure:
    """Return what a client is told whose request is not of the expected form."""
    return Failure(status=status, body=error_object(message, _INVALID, param=param), headers={})
