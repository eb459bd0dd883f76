# SPDX-License-Identifier: Apache-2.0
"""One frozen configuration per verb: the flags of the command line and the keys of its YAML.

A field is a flag: ``learning_rate`` is ``--learning-rate``. The string below a field is its help
text. Paths are text, so that a configuration can be written next to every result as it was given.
"""

from offsite_ray.config.artefacts import (
    CompressConfig,
    DemoConfig,
    InspectConfig,
    PlugInConfig,
    PrepareConfig,
    UnpackConfig,
    VerifyConfig,
)
from offsite_ray.config.measuring import EstimateConfig, EvaluateConfig
from offsite_ray.config.running import RUNS, RunsConfig, check_run_name
from offsite_ray.config.serving import ApplicationConfig, Limits, ServeConfig, check_model_name
from offsite_ray.config.submitting import DoctorConfig, SubmitConfig, check_address
from offsite_ray.config.sweeping import OBJECTIVES, SweepConfig
from offsite_ray.config.training import (
    OFFLOAD_STAGES,
    ComputeDtype,
    DistillConfig,
    FinetuneConfig,
    Offload,
    TrainingConfig,
)

__all__ = [
    "OBJECTIVES",
    "OFFLOAD_STAGES",
    "RUNS",
    "ApplicationConfig",
    "CompressConfig",
    "ComputeDtype",
    "DemoConfig",
    "DistillConfig",
    "DoctorConfig",
    "EstimateConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "InspectConfig",
    "Limits",
    "Offload",
    "PlugInConfig",
    "PrepareConfig",
    "RunsConfig",
    "ServeConfig",
    "SubmitConfig",
    "SweepConfig",
    "TrainingConfig",
    "UnpackConfig",
    "VerifyConfig",
    "check_address",
    "check_model_name",
    "check_run_name",
]
