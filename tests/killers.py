# SPDX-License-Identifier: Apache-2.0
"""Workers that are killed, as by a machine out of memory."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from offsite_ray.data import PartWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from offsite_ray.data import WrittenPart

    WriteParts = Callable[[PartWriter], Generator[WrittenPart, None, None]]


class DyingWriter(PartWriter):
    """A writer that kills its process in one of the parts."""

    deadly = 0
    once: Path | None = None
    """File that says it has happened; None: it happens always."""

    def __call__(self, index: int) -> WrittenPart:
        if index == self.deadly and not (self.once and self.once.exists()):
            if self.once:
                self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(index)


def dying_in(part: int, once: Path | None, write_parts: WriteParts) -> WriteParts:
    """Return what writes parts as ``write_parts`` does, with writers that die in one of them."""

    def write(writer: PartWriter) -> Generator[WrittenPart, None, None]:
        dying = DyingWriter.__new__(DyingWriter)
        vars(dying).update(vars(writer), deadly=part, once=once)
        yield from write_parts(dying)

    return write
