# SPDX-License-Identifier: Apache-2.0
"""Which tenants are in the model, and which wait in host memory.

A tenant's tensors are kept on the host from its registration to its removal. They enter the model
when a request of the tenant waits, brought by a thread of their own while the engine goes on; the
least recently used leave it when others need the room. On a CPU both places are one memory.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from offsite_ray.errors import RequestError
from offsite_ray.serving.routing import BASE

if TYPE_CHECKING:
    from collections.abc import Callable

    from offsite_ray.serving.own import Own
    from offsite_ray.serving.routing import Router

    Do = Callable[[Callable[[], None]], None]
    """Has the engine's thread call something between two steps."""


_LOG = logging.getLogger(__name__)

_AT_ONCE = 4
"""Tenants on their way at a time, so that one that comes slowly keeps no other waiting."""


@dataclass(kw_only=True, slots=True)
class _Tenant:
    """A version of a tenant's adapter."""

    own: Own
    pinned: bool
    here: bool = False
    """Whether it is in the model."""
    coming: bool = False
    """Whether it is on its way there."""
    trouble: str | None = None
    """Why it could not be brought, until those who waited have been told."""
    users: int = 0
    """Requests that wait for it or are served by it."""
    running: int = 0
    """Of them, those that are served."""
    used: float = 0.0
    gone: Future[None] | None = None
    """Set once it is to be removed; done when it is."""


class Residency:
    """The tenants of an engine; may be asked from any thread."""

    def __init__(self, router: Router, max_bytes: int | None = None) -> None:
        """Know no tenant.

        Args:
            router: Of the model.
            max_bytes: Of tenants' tensors in the model; without it all may stay.
        """
        self._router, self._max_bytes = router, max_bytes
        self._tenants: dict[int, _Tenant] = {}
        self._lock = threading.RLock()
        self._bringing = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="bring")
        self.num_brought = self.num_evicted = 0

    @property
    def bytes_here(self) -> int:
        """Bytes of the tenants that are in the model."""
        with self._lock:
            return sum(self._bytes(tenant) for tenant in self._tenants.values() if tenant.here)

    def add(self, number: int, own: Own, *, pinned: bool = False) -> None:
        """Know a tenant from now on.

        Args:
            number: Of this version, never used before.
            own: Its tensors, in host memory.
            pinned: Whether it stays in the model once it is there.
        """
        with self._lock:
            known = self._tenants.get(number)
            if known is None:
                self._tenants[number] = _Tenant(own=own, pinned=pinned)
                return
            # It was to be removed, and requests of it are still served: it simply stays.
            known.pinned, known.gone = pinned, None

    def pin(self, number: int, *, pinned: bool) -> None:
        """Have a tenant stay in the model once it is there, or no more."""
        with self._lock:
            self._tenants[number].pinned = pinned

    def remove(self, number: int, do: Do) -> Future[None]:
        """Take no request for a tenant any more; done when the last one is answered."""
        with self._lock:
            tenant = self._tenants[number]
            gone = tenant.gone = tenant.gone or Future()
        # Not under the lock: the engine's thread asks for it while it holds its own.
        do(self._remove_unused)
        return gone

    def hold(self, number: int) -> None:
        """Count a request for a tenant; raise :class:`RequestError` where there is none."""
        if number == BASE:
            return
        with self._lock:
            tenant = self._tenants.get(number)
            if tenant is None or tenant.gone is not None:
                raise RequestError("this version of the model is no longer served", "model")
            tenant.users += 1

    def begin(self, number: int) -> None:
        """Count a request for a tenant as served from now on; only in the engine's thread."""
        if number != BASE:
            with self._lock:
                self._tenants[number].running += 1

    def release(self, number: int, *, begun: bool = False) -> None:
        """Count a request for a tenant as ended; only in the engine's thread."""
        if number == BASE:
            return
        with self._lock:
            tenant = self._tenants[number]
            tenant.users -= 1
            tenant.running -= begun
            tenant.trouble = None
            tenant.used = time.monotonic()
            if tenant.gone is not None:
                self._remove_unused()

    def trouble(self, number: int) -> str | None:
        """Return why a tenant could not be brought; those who wait for it are to be told."""
        with self._lock:
            tenant = self._tenants.get(number)
            return None if tenant is None else tenant.trouble

    def may_be_here(self, number: int) -> bool:
        """Return whether it is worth asking for a tenant: it is not just on its way."""
        with self._lock:
            tenant = self._tenants.get(number)
            return tenant is None or not tenant.coming

    def where(self, number: int, do: Do) -> Literal["here", "coming", "full"]:
        """Return whether a tenant is in the model; if not, have it brought as soon as it fits."""
        if number == BASE:
            return "here"
        with self._lock:
            tenant = self._tenants[number]
            if tenant.here or tenant.coming:
                return "here" if tenant.here else "coming"
            if not self._make_room(self._bytes(tenant)):
                return "full"
            tenant.coming = True
            self._bringing.submit(self._bring, number, do)
            return "coming"

    def _bring(self, number: int, do: Do) -> None:
        """Copy a tenant's tensors to the device, and have the engine take them in."""
        try:
            with self._lock:
                own = self._tenants[number].own
            model = self._router.model
            moved = own.to(model.device, model.dtype)
        except Exception as error:
            _LOG.exception("a tenant cannot be brought into the model")
            do(partial(self._not_brought, number, str(error)))
            return
        do(partial(self._take_in, number, moved))

    def _not_brought(self, number: int, why: str) -> None:
        with self._lock:
            tenant = self._tenants.get(number)
            if tenant is not None:
                tenant.coming, tenant.trouble = False, why if tenant.users else None

    def _take_in(self, number: int, moved: Own) -> None:
        with self._lock:
            tenant = self._tenants.get(number)
            if tenant is None:
                return
            try:
                self._router.put(number, moved)
            except Exception as error:
                self._not_brought(number, str(error))
                raise
            tenant.here, tenant.coming = True, False
            tenant.used = time.monotonic()
            self.num_brought += 1

    def _make_room(self, nbytes: int) -> bool:
        """Let the least recently used tenants go that serve nobody; return whether it is enough.

        Where only pinned ones are left, or none, waiting would bring nothing: one more comes.
        """
        if self._max_bytes is None:
            return True
        held = sum(self._bytes(t) for t in self._tenants.values() if t.here or t.coming)
        idle = [
            (tenant.used, number)
            for number, tenant in self._tenants.items()
            if tenant.here and not tenant.running and not tenant.pinned
        ]
        for _, number in sorted(idle):
            if held + nbytes <= self._max_bytes:
                break
            self._router.remove(number)
            self._tenants[number].here = False
            self.num_evicted += 1
            held -= self._bytes(self._tenants[number])
        left = [t for t in self._tenants.values() if t.here or t.coming]
        return held + nbytes <= self._max_bytes or all(t.pinned and t.here for t in left)

    def _bytes(self, tenant: _Tenant) -> int:
        """Return what a tenant takes in the model, in whose dtype it is there."""
        return tenant.own.num_elements * self._router.model.dtype.itemsize

    def _remove_unused(self) -> None:
        with self._lock:
            for number, tenant in list(self._tenants.items()):
                if tenant.gone is not None and not tenant.users:
                    if tenant.here:
                        self._router.remove(number)
                    del self._tenants[number]
                    tenant.gone.set_result(None)
