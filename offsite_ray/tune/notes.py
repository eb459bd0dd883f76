# SPDX-License-Identifier: Apache-2.0
"""What the stages of a job took and found, in a file beside what they made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from offsite_ray.bundle import write_json
from offsite_ray.tune.folders import read_record

if TYPE_CHECKING:
    from pathlib import Path

STAGES = "stages.json"
"""Name of the file."""


@dataclass(kw_only=True, slots=True)
class Notes:
    """What is known of some stages, those of an earlier attempt among them."""

    file: Path
    seconds: dict[str, float] = field(init=False)
    """Stage to the time that it took."""
    found: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """Take up what stages of an earlier attempt have found."""
        known = read_record(self.file) or {"seconds": {}, "found": {}}
        self.seconds, self.found = known["seconds"], known["found"]

    def note(self, stage: str, seconds: float, **found: Any) -> None:
        """Keep what a stage took and found, should the job be killed after it."""
        self.seconds[stage] = seconds
        self.found |= found
        write_json(self.file, {"seconds": self.seconds, "found": self.found})

    def learn(self, other: Notes) -> None:
        """Take up what other notes say; nothing is written."""
        self.seconds |= other.seconds
        self.found |= other.found
