# SPDX-License-Identifier: Apache-2.0
"""What goes between the ingress, the replicas and the store: plain values.

An error that somebody raised on the other side comes back as a value, and is raised again here:
what the side itself raises is then always a fault of the side, never of what was asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from offsite_ray.serving.registry import Snapshot
    from offsite_ray.serving.requests import Piece, Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A prompt for a version of a model."""

    id: str
    model: str
    """Name, for logs and metrics."""
    version: int
    """Number of the version; that of the full model is 0."""
    prompt: tuple[int, ...]
    sampling: Sampling


class Engines(Protocol):
    """The replicas, as the ingress sees them."""

    async def complete(self, ask: Ask) -> Sequence[Piece]:
        """Return the whole answer.

        Raises:
            OffsiteError: It cannot be answered; :class:`LostError` where another may.
        """

    def stream(self, ask: Ask) -> AsyncGenerator[Sequence[Piece]]:
        """Yield the answer as it grows; errors are those of :meth:`complete`."""

    async def check(self) -> None:
        """Raise :class:`LostError` where none of them can answer."""


class Records(Protocol):
    """The store, as the ingress sees it."""

    async def snapshot(self, revision: int | None) -> Snapshot | None:
        """Return what is served, or None where it is still that of a revision."""

    async def call(self, method: str, *given: Any, **named: Any) -> Any:
        """Call a method of the store that is in its table of calls."""
