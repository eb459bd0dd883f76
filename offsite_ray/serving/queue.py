# SPDX-License-Identifier: Apache-2.0
"""Who is served next: the tenant that was served least, of those that wait (fair queueing).

Each tenant has a counter of what it was given; a prompt's token counts 1 and a token of the answer
2, which costs more. Who comes back after a pause starts at the lowest counter of those who wait
(where nobody waits, at that of the last who did), so that nobody saves up. This is the virtual
token counter of Sheng et al., arXiv 2401.00588, algorithm 2: the service of two tenants that both
wait differs by a bound, however much they send.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from offsite_ray.serving.requests import Request

PROMPT_COST, ANSWER_COST = 1, 2
"""What a token of a prompt counts, and one of an answer."""

CALM_S = 5.0
"""How long a tenant that was refused may not wait, only take what is free at once. A queue takes in
a burst; while more comes than fits it would stay full, and all who get in would have waited for
nothing: no more of them are answered. (Nichols and Jacobson call that a bad queue, ACM Queue 2012.)
"""


class FairQueue:
    """Requests that wait, by tenant."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Hold none."""
        self._clock = clock
        self._waiting: dict[int, deque[Request]] = {}
        self._refused: dict[int, float] = {}
        """By tenant: when it was refused last."""
        self._served: dict[int, float] = {}
        self._last_left = 0.0
        """Counter of the tenant that was the last to have nothing waiting."""

    def __len__(self) -> int:
        """Return the number of requests that wait."""
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Request]:
        """Yield every request that waits."""
        for requests in self._waiting.values():
            yield from requests

    def may_wait(self, tenant: int) -> bool:
        """Return whether a tenant may wait for a place: it was not refused lately."""
        return self._clock() - self._refused.get(tenant, -math.inf) > CALM_S

    def refuse(self, tenant: int) -> None:
        """Note that a tenant had no place."""
        self._refused[tenant] = self._clock()

    def displaced_by(self, tenant: int) -> Request | None:
        """Return whose place somebody gets of whom none waits; None where nobody has two."""
        if tenant in self._waiting or not self._waiting:
            return None
        most = max(self._waiting.values(), key=len)
        return most[-1] if len(most) > 1 else None

    def put(self, request: Request) -> None:
        """Have a request wait."""
        if request.tenant not in self._waiting:
            lowest = min((self._served[t] for t in self._waiting), default=self._last_left)
            self._served[request.tenant] = max(self._served.get(request.tenant, 0.0), lowest)
            self._waiting[request.tenant] = deque()
        self._waiting[request.tenant].append(request)

    def in_turn(self) -> Iterator[Request]:
        """Yield the first request of each tenant, of the least served tenant first."""
        for tenant in sorted(self._waiting, key=lambda tenant: self._served[tenant]):
            yield self._waiting[tenant][0]

    def take(self, request: Request) -> None:
        """Remove a request that is served now, or no more."""
        requests = self._waiting[request.tenant]
        requests.remove(request)
        if not requests:
            del self._waiting[request.tenant]
            self._last_left = self._served[request.tenant]

    def served(self, tenant: int, cost: float) -> None:
        """Count what a tenant was given."""
        self._served[tenant] = self._served.get(tenant, 0.0) + cost
