# SPDX-License-Identifier: Apache-2.0
"""Configuration of what is submitted to a Ray cluster as a job."""

from __future__ import annotations

import re
from collections.abc import Mapping  # noqa: TC003  # the flags are read from the annotations
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from offsite_ray.config.ranges import check_least, check_positive
from offsite_ray.config.running import check_run_name, is_run_name
from offsite_ray.errors import ConfigError
from offsite_ray.uris import is_uri, shown

ACTIONS = ("list", "status", "stop")
"""What can be asked in the place of a verb."""

_ADDRESS = re.compile(r"https?://[^/\s@]+/?")


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitConfig:
    """Run a verb as a Ray job, or see what became of one."""

    verb: str
    """Verb to run, or list, status or stop."""
    recipe: str | None = field(default=None, metadata={"given": "--config"})
    """Recipe of the verb; what is below submit in it sets flags of this one."""
    words: tuple[str, ...] = field(default=(), metadata={"given": "KEY=VALUE"})
    """What is changed in the recipe."""
    address: str | None = None
    """Where the cluster's job server listens, http://HEAD:8265; by default RAY_API_SERVER_ADDRESS.
    """
    name: str | None = None
    """Name of the run; by default the verb's and that of the recipe. Submitted again, a run goes
    on."""
    root: str | None = None
    """Folder that the recipe's paths are below; every node must see it."""
    runs: str | None = None
    """Directory that the run's own directory is made in; by default runs, below `root`."""
    follow: bool = False
    """Show the job's log until its end, and exit as it does; with status too."""
    packages: Literal["installed", "pip", "any"] = "installed"
    """Of the nodes: installed, which must be in the versions of this machine; pip: Ray installs
    these; any: unchecked."""
    driver_cpus: float = 0.0
    """CPUs of the driver; needed where it computes itself. One that needs nothing is on the head.
    """
    driver_gpus: float = 0.0
    """GPUs of the driver."""
    driver_resources: Mapping[str, Any] | None = None
    """Resources of the driver's node, e.g. '{steady: 0.01}'."""
    driver_labels: Mapping[str, Any] | None = None
    """Labels of the driver's node, e.g. '{ray.io/market-type: on-demand}'."""
    reconnect_timeout: float = 300.0
    """Seconds without the job server after which following ends; the job goes on."""

    def __post_init__(self) -> None:
        """Check what can be checked without the cluster; raise :class:`ConfigError`."""
        if self.address is not None:
            check_address(self.address)
        if self.name is not None:
            check_run_name(self.name, "name")
        check_least(self, 0, "driver_cpus", "driver_gpus", "reconnect_timeout")
        for key, value in (self.driver_resources or {}).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigError(f"driver_resources: {key}={value!r} must be a number above 0")
        for key, value in (self.driver_labels or {}).items():
            if not isinstance(value, str):
                raise ConfigError(f"driver_labels: {key}={value!r} must be a text")
        for name in ("root", "runs"):
            if is_uri(given := getattr(self, name) or ""):
                raise ConfigError(f"{name}={shown(given)!r} must be a path that every node sees")
        if self.root is not None and not Path(self.root).is_absolute():
            raise ConfigError(
                f"root={self.root!r} must be a whole path: the job does not begin in this folder"
            )
        if self.runs is not None and self.root is None and not Path(self.runs).is_absolute():
            raise ConfigError(
                f"runs={self.runs!r} is below no folder that outlives the job; give --root DIR, "
                "which every node sees, or a whole path"
            )
        self._check_action()

    def _check_action(self) -> None:
        if self.verb not in ACTIONS:
            if self.recipe is None:
                raise ConfigError(f"submit {self.verb} needs --config, the recipe to run")
        elif self.words:
            raise ConfigError(f"submit {self.verb} has no use for {self.words[0]!r}")
        elif self.verb != "list" and self.name is None:
            raise ConfigError(f"submit {self.verb} needs --name; 'submit list' lists them")

    @property
    def runs_directory(self) -> str | None:
        """Where the run's directory is made, perhaps below `root`; None: nowhere."""
        return self.runs or (None if self.root is None else "runs")

    @property
    def run_name(self) -> str:
        """The run's name.

        Raises:
            ConfigError: It has none, and the recipe's cannot be one.
        """
        name = self.name or f"{self.verb}-{Path(self.recipe or '').stem}"
        if not is_run_name(name):
            raise ConfigError(f"{name!r} cannot be the name of a run; give one with --name")
        return name


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """Check whether machines are fit for what is to run on them."""

    address: str | None = None
    """Where a cluster's job server listens, http://HEAD:8265; by default the Ray of RAY_ADDRESS is
    examined, or this machine alone."""
    storage: str | None = None
    """Path or URI of the runs; every node writes, reads and removes a small file there."""
    timeout: float = 120.0
    """Seconds that every node has to answer."""
    min_free_disk_gib: float = 10.0
    """GiB that must be free on each disk that is used."""
    min_free_memory_gib: float = 2.0
    """GiB of memory that must be free."""
    max_clock_skew: float = 1.0
    """Seconds that the clock of a node may be off."""

    def __post_init__(self) -> None:
        """Check what can be checked from here; raise :class:`ConfigError`."""
        if self.address is not None:
            check_address(self.address)
            if self.storage and not is_uri(self.storage) and not Path(self.storage).is_absolute():
                raise ConfigError(
                    f"storage={self.storage!r} must be a whole path or a URI, where every node is "
                    "to write to it"
                )
        check_positive(self, "timeout")
        check_least(self, 0, "min_free_disk_gib", "min_free_memory_gib", "max_clock_skew")


def check_address(address: str) -> None:
    """Refuse what is no address of a job server; raise :class:`ConfigError`."""
    if not _ADDRESS.fullmatch(address):
        raise ConfigError(
            f"address={address.rpartition('@')[2]!r} must be http://HOST:PORT or https://HOST:PORT "
            "of the dashboard, whose port is 8265 unless it was started otherwise; a token comes "
            "from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        )
