# SPDX-License-Identifier: Apache-2.0
"""Training on Ray Train with DeepSpeed ZeRO: the same loop as in one process, another engine."""

from offsite_ray.train.engine import DeepSpeedEngine, deepspeed_config
from offsite_ray.train.run import run_on_ray
from offsite_ray.train.teacher import fill_on_ray

__all__ = ["DeepSpeedEngine", "deepspeed_config", "fill_on_ray", "run_on_ray"]
