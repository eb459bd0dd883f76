# SPDX-License-Identifier: Apache-2.0
"""What a verb of the command line is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from offsite_ray.cli.output import Outcome


@dataclass(frozen=True, slots=True)
class Verb:
    """One step of the loop."""

    name: str
    config: type
    summary: str
    run: Callable[[Any], Outcome]
    recorded: bool = True
    """Whether it can be a run with a record: it makes or measures something."""
