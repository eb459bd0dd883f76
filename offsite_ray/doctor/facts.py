# SPDX-License-Identifier: Apache-2.0
"""What is known of a node, as plain values; what was not measured is None."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU, as its driver tells of it."""

    name: str
    total_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """A file system that something of ours lies on."""

    path: str
    total_bytes: int
    free_bytes: int
    """For users who are not root."""
    for_ray: bool = False
    """Whether Ray keeps its session, and objects that fit in no memory, there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """What became of a small file that was to be written, read and removed."""

    problem: str | None = None
    """Why one of these failed; None: all was done."""
    shared: bool | None = None
    """Whether the file is there that the asking process wrote; None: it wrote none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extension:
    """The extension of DeepSpeed's workers on CPUs."""

    file: str
    """Where torch keeps it."""
    compiled: bool
    missing: tuple[str, ...] = ()
    """What is not there of that which compiles it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known of a node."""

    node: str
    problem: str | None = None
    """Why it could not be examined, or not all of it."""
    versions: Mapping[str, str | None] | None = None
    """Package to version; None where it is not installed."""
    num_cpus: float | None = None
    """That Ray counts; without Ray those of the machine."""
    memory_bytes: int | None = None
    """Of the machine, or of its container."""
    free_memory_bytes: int | None = None
    gpus: tuple[Gpu, ...] | None = None
    """None where no NVIDIA driver can be asked."""
    num_torch_gpus: int | None = None
    num_ray_gpus: float | None = None
    disks: tuple[Disk, ...] = ()
    storage: Storage | None = None
    extension: Extension | None = None
    auth_mode: str | None = None
    """``RAY_AUTH_MODE``."""
    open_dashboard: bool | None = None
    """Whether the dashboard answers without a token; the asking process looks."""
    clock_ahead_s: float | None = None
    """Before the clock of the asking process."""
    round_trip_s: float | None = None
    """Of the question after the time; by half of it ``clock_ahead_s`` may be wrong."""


def facts_from_plain(plain: Mapping[str, Any]) -> Facts:
    """Return what :func:`offsite_ray.results.to_plain` made plain."""
    gpus, storage, extension = (plain[key] for key in ("gpus", "storage", "extension"))
    own = {
        "gpus": None if gpus is None else tuple(Gpu(**gpu) for gpu in gpus),
        "disks": tuple(Disk(**disk) for disk in plain["disks"]),
        "storage": None if storage is None else Storage(**storage),
        "extension": extension
        and Extension(**{**extension, "missing": tuple(extension["missing"])}),
    }
    return Facts(**{**plain, **own})
