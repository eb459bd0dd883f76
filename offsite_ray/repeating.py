# SPDX-License-Identifier: Apache-2.0
"""Work that is done again and again beside what this process does."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def repeating(work: Callable[[], object], every_s: float, name: str) -> Iterator[None]:
    """Do something every so many seconds until the block ends, first after so many.

    Args:
        work: What is to be done, by another thread; it has ended when the block has.
        every_s: Seconds in between.
        name: Of the thread.
    """
    ended = threading.Event()

    def again() -> None:
        while not ended.wait(every_s):
            work()

    thread = threading.Thread(target=again, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
