# SPDX-License-Identifier: Apache-2.0
"""The report of a sweep: one page that stands alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def write_page(path: Path, *_: Any) -> None:
    """Write it."""
    path.write_text("x")
