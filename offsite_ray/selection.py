# SPDX-License-Identifier: Apache-2.0
"""Selection methods: which blocks of the middle the emulator keeps. One row per method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offsite_ray.errors import PlanError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offsite_ray.split import SelectPositions


def uniform(middle: Sequence[int], num_kept: int) -> list[int]:
    """Return ``num_kept`` evenly spaced blocks of ``middle``, both ends included.

    Block ``round(i * (n - 1) / (num_kept - 1))`` of the ``n`` middle blocks, rounding half to
    even, as in Xiao et al., arXiv 2302.04870, section 3.2. One kept block is the one in the
    centre, where the paper's formula divides by zero.
    """
    if num_kept == 0:
        return []
    if num_kept == 1:
        return [middle[(len(middle) - 1) // 2]]
    stride = (len(middle) - 1) / (num_kept - 1)
    return [middle[round(i * stride)] for i in range(num_kept)]


SELECTION_METHODS: dict[str, SelectPositions] = {"uniform": uniform}
"""Every selection method by the name that ``--select`` takes."""


def selection_method(name: str) -> SelectPositions:
    """Return the method of that name; raise :class:`PlanError` for any other."""
    if name not in SELECTION_METHODS:
        raise PlanError(unknown_name("selection method", name, SELECTION_METHODS))
    return SELECTION_METHODS[name]
