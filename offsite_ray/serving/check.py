# SPDX-License-Identifier: Apache-2.0
"""What can be said of a configuration before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offsite_ray.bundle import check_parent
from offsite_ray.emulator import open_full_model
from offsite_ray.serving.tenants import read_own

if TYPE_CHECKING:
    from offsite_ray.config import ApplicationConfig


def check_servable(config: ApplicationConfig) -> None:
    """Look at the full model and the adapter bundles.

    Raises:
        OffsiteError: One cannot be served; nothing was written.
    """
    from pathlib import Path

    full = open_full_model(config.model)
    registry = Path(config.state) / "registry.sqlite"
    check_parent(registry)
    for path in map(Path, config.adapters().values()):
        if path.is_dir() or not registry.exists():  # the store knows what it has taken in
            read_own(path, full)
