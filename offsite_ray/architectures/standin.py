# SPDX-License-Identifier: Apache-2.0
"""Modules in the place of blocks."""

from __future__ import annotations

from typing import Any

from torch import nn


class StandIn(nn.Module):
    """In the place of a block; has the attributes that a model asks of its blocks."""

    attributes_of: str
    """Name of the attribute that holds the block, which answers for e.g. its attention type."""

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the block where the module has none of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.attributes_of:
                raise
            return getattr(getattr(self, self.attributes_of), name)
