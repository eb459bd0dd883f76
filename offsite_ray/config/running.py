# SPDX-License-Identifier: Apache-2.0
"""Configuration of what is known of runs, and the names that they may have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from offsite_ray.errors import ConfigError

RUNS = "OFFSITE_RAY_RUNS"
"""Environment variable with the directory that the directories of runs are in."""

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,99}")


def is_run_name(name: str) -> bool:
    """Return whether a run may be called so; it is a directory and part of a job's id."""
    return _NAME.fullmatch(name) is not None


def check_run_name(name: str, field: str) -> None:
    """Refuse what cannot be the name of a run; raise :class:`ConfigError`."""
    if not is_run_name(name):
        raise ConfigError(
            f"{field}={name!r} must be letters, digits, '.', '_' and '-', up to 100, the first a "
            "letter or digit"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunsConfig:
    """List the runs whose directories are in one directory."""

    runs: str | None = None
    """Directory that the directories of runs are in; by default OFFSITE_RAY_RUNS."""
    name: str | None = None
    """Only the run of this name, with its attempts."""

    def __post_init__(self) -> None:
        """Check the name; raise :class:`ConfigError`."""
        if self.name is not None:
            check_run_name(self.name, "name")
