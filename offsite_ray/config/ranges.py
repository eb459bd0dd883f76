# SPDX-License-Identifier: Apache-2.0
"""Ranges of numbers; None, which leaves a choice open, and nothing else is in all of them."""

from __future__ import annotations

from typing import Any

from offsite_ray.errors import ConfigError


def check_least(config: Any, least: float, *names: str) -> None:
    """Refuse what is below, or no number; raise :class:`ConfigError`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{name}={value} must be at least {least}")


def check_positive(config: Any, *names: str) -> None:
    """Refuse what is not above 0, or no number; raise :class:`ConfigError`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name}={value} must be above 0")
