# SPDX-License-Identifier: Apache-2.0
"""Sweeps: many emulators tried beside their controls, and the ones worth having.

What is run is planned with plain values, a job is run by the functions behind the verbs, and only
``on_ray`` knows Ray Tune.
"""

from offsite_ray.tune.finish import SweepResult
from offsite_ray.tune.opening import SweepSize, dry_run
from offsite_ray.tune.planned import Sweep, plan_sweep
from offsite_ray.tune.run import sweep

__all__ = ["Sweep", "SweepResult", "SweepSize", "dry_run", "plan_sweep", "sweep"]
