# SPDX-License-Identifier: Apache-2.0
"""What a sweep refuses before anything runs, so that no mistake is found trial by trial."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offsite_ray.config import EvaluateConfig
from offsite_ray.errors import ConfigError
from offsite_ray.evaluation.settings import open_yardstick
from offsite_ray.tune.halving import check_proxy
from offsite_ray.tune.space import Range, may_distil
from offsite_ray.tune.trial import wants_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers.configuration_utils import PretrainedConfig

    from offsite_ray.config import SweepConfig
    from offsite_ray.tune.space import Variant

_MEASURING = (
    "model", "blocks", "text", "tasks", "task_data", "task_path", "task_limit", "seq_len",
    "batch_size", "dtype",
)  # fmt: skip
"""Fields of an evaluation that a sweep gives every job."""


def check_measuring(config: SweepConfig, model: Path, model_config: PretrainedConfig) -> None:
    """Read the texts and the tasks that every job is measured with, as an evaluation does.

    Raises:
        OffsiteError: One of them cannot be read, or the model has fewer positions.
    """
    measuring = EvaluateConfig(**{name: getattr(config, name) for name in _MEASURING})
    open_yardstick(measuring, model, model_config)


def check_space(variants: Sequence[Variant], config: SweepConfig) -> None:
    """Refuse a space that does not go with what else is asked for.

    Raises:
        ConfigError: It takes public text where there is none, its workers cannot be counted, or
            trials are to be stopped that cannot be.
    """
    check_proxy(config.proxy)
    if not config.public:
        _check_without_text(variants)
    workers = workers_per_trial(variants)
    if config.early_stop and workers["distill"]:
        raise ConfigError(
            f"early_stop with distill.num_workers={workers['distill']}: what trains in workers "
            "of its own cannot be stopped early; leave distill.num_workers at 0, or early_stop out"
        )


def workers_per_trial(variants: Sequence[Variant]) -> dict[str, int]:
    """Return the most Ray Train workers that each training of a trial asks for.

    Raises:
        ConfigError: They are a range.
    """
    most = {"distill": 0, "finetune": 0}
    for variant in variants:
        for stage, known in most.items():
            if stage == "distill" and not may_distil(variant):
                continue
            name = f"{stage}.num_workers"
            knob = variant.get(name, ())
            if isinstance(knob, Range):
                raise ConfigError(
                    f"{name} is a range, and what a trial takes must be known before; list values"
                )
            most[stage] = max([known, *(value for value in knob if isinstance(value, int))])
    return most


def _check_without_text(variants: Sequence[Variant]) -> None:
    """Refuse a space that takes public text where there is none."""
    if any(map(may_distil, variants)):
        raise ConfigError("the space distils; give the text for it as public: [FILE]")
    for variant in variants:
        for field in ("select", "compress"):
            knob = variant.get(f"compress.{field}", ())
            for value in () if isinstance(knob, Range) else knob:
                if wants_text({field: value, "calibration": variant.get("compress.calibration")}):
                    raise ConfigError(
                        f"{field}: {value} looks at what the full model does with text; give it "
                        "some as public: [FILE]"
                    )
