# SPDX-License-Identifier: Apache-2.0
"""What can be said of a configuration before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offsite_ray.bundle import check_parent
from offsite_ray.emulator import open_full_model
from offsite_ray.errors import StorageError
from offsite_ray.serving.tenants import read_own
from offsite_ray.uris import refuse_uri

if TYPE_CHECKING:
    from offsite_ray.config import ApplicationConfig


def check_servable(config: ApplicationConfig) -> None:
    """Look at the full model and the adapter bundles.

    Raises:
        OffsiteError: One cannot be served; nothing was written.
    """
    from pathlib import Path

    refuse_uri("--state", config.state)
    refuse_uri("--admin-key-file", config.admin_key_file)
    full = open_full_model(config.model)
    registry = Path(config.state) / "registry.sqlite"
    check_parent(registry)
    for name in config.adapters().values():
        try:
            read_own(name, full)
        except StorageError:
            if not registry.exists():  # else the store knows what it has taken in
                raise
