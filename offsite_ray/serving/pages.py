# SPDX-License-Identifier: Apache-2.0
"""The page at ``/``, from which models are tried out."""

from __future__ import annotations

import functools
from importlib.resources import files


@functools.cache
def playground() -> str:
    """Return the page; it loads nothing from elsewhere."""
    return files("offsite_ray.serving").joinpath("playground.html").read_text("utf-8")
