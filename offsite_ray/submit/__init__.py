# SPDX-License-Identifier: Apache-2.0
"""Verbs as Ray jobs: packed, submitted under a name, followed to their end.

A run has a name; each time that it is submitted it becomes a job, NAME-1, NAME-2 and so on. What a
run has done is on disk, where the verb finds it when it is submitted again.
"""

from offsite_ray.submit.following import follow
from offsite_ray.submit.packing import RECIPE, REQUIREMENTS, check_installed, read_recipe
from offsite_ray.submit.run import ended_well, run_named, stop, submit
from offsite_ray.submit.server import ADDRESS, Job, JobServer

__all__ = [
    "ADDRESS",
    "RECIPE",
    "REQUIREMENTS",
    "Job",
    "JobServer",
    "check_installed",
    "ended_well",
    "follow",
    "read_recipe",
    "run_named",
    "stop",
    "submit",
]
