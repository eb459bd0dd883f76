# SPDX-License-Identifier: Apache-2.0
"""Who may use which model, and how often.

A model that a key may not see answers exactly like one that does not exist.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offsite_ray.errors import OffsiteError
from offsite_ray.serving.registry import Key, hash_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from offsite_ray.serving.registry import Snapshot, Version

_MINUTE = 60.0


class DeniedError(OffsiteError):
    """No key, or an unknown one."""


class ForbiddenError(OffsiteError):
    """A key that may not do that."""


class UnknownModelError(OffsiteError):
    """A model that there is not, or that the key may not see: nobody is told which."""


class RateError(OffsiteError):
    """More requests in a minute than the key may send."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        """Say after how many seconds the next request is allowed."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(kw_only=True, slots=True)
class Bucket:
    """Tokens that flow in evenly and are taken by requests; a full one is a minute's worth."""

    per_minute: int
    level: float
    at: float

    def take(self, now: float) -> float:
        """Take one; return 0, or the seconds after which there is one to take."""
        flow = self.per_minute / _MINUTE
        self.level = min(float(self.per_minute), self.level + (now - self.at) * flow)
        self.at = now
        if self.level >= 1:
            self.level -= 1
            return 0.0
        return (1 - self.level) / flow


@dataclass(kw_only=True, slots=True)
class Gate:
    """Knows the keys, and what has been sent with each; one in each ingress process."""

    snapshot: Snapshot
    base: str | None = None
    """Model id of the full model as it is, where it is served."""
    clock: Callable[[], float] = time.monotonic
    _buckets: dict[str, Bucket] = field(default_factory=dict)

    def key(self, token: str | None) -> Key:
        """Return a key, by what its bearer shows; raise :class:`DeniedError` where it is none."""
        key = self.snapshot.keys.get(hash_of(token or ""))
        if key is None:
            raise DeniedError("give a valid key as 'Authorization: Bearer KEY'")
        return key

    def bearer(self, token: str | None) -> Key:
        """Return what the bearer of a key may do, and count the request.

        Raises:
            DeniedError: There is no such key.
            RateError: The key has sent too much.
        """
        key = self.key(token)
        if key.per_minute is not None:
            self._count(hash_of(token or ""), key.per_minute)
        return key

    def models(self, key: Key) -> list[str]:
        """Return the models that a key may see, by name."""
        tenants = [name for name in self.snapshot.tenants if key.admin or name in key.models]
        return sorted([*tenants, *([self.base] if self.base and self._sees_base(key) else [])])

    def version(self, key: Key, model: str) -> Version | None:
        """Return the current version of a model; None of the full model as it is.

        Raises:
            UnknownModelError: The key may not see it, or there is none of that name.
        """
        if model not in self.models(key):
            raise UnknownModelError(f"there is no model {model!r}")
        return self.snapshot.tenants.get(model)

    def admin(self, key: Key) -> None:
        """Refuse who may not change what is served; raise :class:`ForbiddenError`."""
        if not key.admin:
            raise ForbiddenError("this takes an admin's key")

    def _sees_base(self, key: Key) -> bool:
        return key.admin or self.base in key.models

    def _count(self, digest: str, per_minute: int) -> None:
        now = self.clock()
        bucket = self._buckets.get(digest)
        if bucket is None or bucket.per_minute != per_minute:
            bucket = Bucket(per_minute=per_minute, level=float(per_minute), at=now)
            self._buckets[digest] = bucket
        wait = bucket.take(now)
        if wait > 0:
            raise RateError(f"this key may send {per_minute} requests a minute", wait)
