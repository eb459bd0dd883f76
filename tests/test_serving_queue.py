# SPDX-License-Identifier: Apache-2.0
"""Who of those that wait is served next, and who may wait."""

from __future__ import annotations

from offsite_ray.serving.queue import CALM_S, FairQueue
from offsite_ray.serving.requests import Request, Sampling

PROMPT = (5, 9, 60, 31)


def test_who_comes_back_has_saved_up_nothing() -> None:
    queue = FairQueue()

    def wish(tenant: int) -> Request:
        sampling = Sampling(max_tokens=1)
        return Request(id="", tenant=tenant, prompt=PROMPT, sampling=sampling, tell=lambda _: None)

    for _ in range(100):  # the first is served alone for long
        request = wish(1)
        queue.put(request)
        queue.take(request)
        queue.served(1, 1000.0)
    others = [wish(2) for _ in range(4)]
    for request in others:  # the second comes while nobody waits
        queue.put(request)
    own = wish(1)
    queue.put(own)
    taken = []
    while len(queue):
        request = next(iter(queue.in_turn()))
        queue.take(request)
        queue.served(request.tenant, 1000.0)
        taken.append(request.tenant)
    assert taken.index(1) <= 2, taken


def test_who_was_refused_may_wait_again_after_some_calm() -> None:
    now = [100.0]
    queue = FairQueue(clock=lambda: now[0])
    assert queue.may_wait(1)
    queue.refuse(1)
    assert not queue.may_wait(1)
    assert queue.may_wait(2)
    now[0] += CALM_S - 1
    queue.refuse(1)
    now[0] += CALM_S - 1
    assert not queue.may_wait(1)
    now[0] += 2
    assert queue.may_wait(1)
