# SPDX-License-Identifier: Apache-2.0
"""A job that is at work: what it shares with the others, where it is, whom it tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from offsite_ray.tune.notes import STAGES, Notes
from offsite_ray.tune.space import NUM_WORKERS

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_ray.config import ComputeDtype
    from offsite_ray.tune.plan import Job

Tell = Callable[[int, Mapping[str, float]], None]
"""Told of a distillation: ``(steps, held-out losses by part)``; may raise, to stop the job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What every job of a sweep has in common. Plain values: it is shipped to workers."""

    root: str
    """Directory of the sweep, which every node sees."""
    model: str
    private: str
    """Prepared data to fine-tune on."""
    public: str | None
    """Prepared data to distil on."""
    blocks: str | None
    text: tuple[str, ...]
    tasks: tuple[str, ...]
    task_data: tuple[str, ...]
    task_path: tuple[str, ...]
    task_limit: int | None
    seq_len: int
    batch_size: int
    dtype: ComputeDtype
    teacher_cache: bool
    """Whether distillations read the teacher's outputs, computed once for all."""
    facts: Mapping[str, Any]
    """What every record says of the data: their digests."""

    def to_plain(self) -> dict[str, Any]:
        """Return what :meth:`from_plain` takes."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Shared:
        """Return what was made plain."""
        tuples = {n: tuple(plain[n]) for n in ("text", "tasks", "task_data", "task_path")}
        return cls(**{**plain, **tuples})


@dataclass(kw_only=True, slots=True)
class Bench:
    """A job that is at work."""

    job: Job
    shared: Shared
    folder: Path
    tell: Tell
    notes: Notes = field(init=False)
    """What its own stages have cost and found so far, and those of its emulator."""

    def __post_init__(self) -> None:
        """Take up what stages of an earlier attempt have found."""
        self.notes = Notes(file=self.folder / STAGES)

    def common(self, stage: str) -> dict[str, Any]:
        """Return the fields of a training verb that every job of the sweep shares."""
        given: dict[str, Any] = dict(self.job.settings[stage])
        own = {"dtype": self.shared.dtype, "seed": self.job.seed, "resume": True}
        return {"num_workers": NUM_WORKERS, **given, **own}
