# SPDX-License-Identifier: Apache-2.0
"""Compression methods: what becomes of an emulator block's tensors. One row per method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offsite_ray.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Compression:
    """How the emulator blocks are made smaller or lossier, beyond dropping some."""

    name: str
    lossless: bool
    """Whether the emulator blocks stay the full model's, bit for bit."""
    apply: Callable[[str, Tensor, int], Tensor] | None
    """``(name on disk, tensor, seed) -> tensor`` of the same shape and dtype; None: as it is."""


COMPRESSION_METHODS: dict[str, Compression] = {
    row.name: row for row in (Compression(name="none", lossless=True, apply=None),)
}
"""Every compression method by the name that ``--compress`` takes."""


def compression_method(name: str) -> Compression:
    """Return the method of that name; raise :class:`ConfigError` for any other."""
    if name not in COMPRESSION_METHODS:
        raise ConfigError(unknown_name("compression method", name, COMPRESSION_METHODS))
    return COMPRESSION_METHODS[name]
