# SPDX-License-Identifier: Apache-2.0
"""Preflight: whether machines are fit for what is to run on them, and how to mend what is not.

Each node is measured where it is, and all are judged together: :func:`measure` gives
:class:`Facts`, :func:`judge` makes :class:`Finding` of them.
"""

from offsite_ray.doctor.checks import CHECKS, Finding, judge
from offsite_ray.doctor.facts import Facts, facts_from_plain
from offsite_ray.doctor.measure import asked_without_token, measure, versions
from offsite_ray.doctor.on_ray import examine_ray
from offsite_ray.doctor.table import tables

__all__ = [
    "CHECKS",
    "Facts",
    "Finding",
    "asked_without_token",
    "examine_ray",
    "facts_from_plain",
    "judge",
    "measure",
    "tables",
    "versions",
]
