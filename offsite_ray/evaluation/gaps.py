# SPDX-License-Identifier: Apache-2.0
"""The gaps between the settings: plain numbers in, plain numbers out."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from offsite_ray import __version__
from offsite_ray.bundle.manifest import now
from offsite_ray.results import (
    SETTINGS,
    EvaluationResult,
    GapMetric,
    Gaps,
    SettingResult,
    main_metric,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_PACKAGES = ("torch", "transformers", "lm_eval")


def compare(
    settings: Mapping[str, SettingResult], *, recipe: Mapping[str, Any], seconds: float
) -> EvaluationResult:
    """Return the settings with the gaps between them.

    Gaps are counted in nats per token where a text was measured, else in the tasks' mean score; a
    gap is positive where what offsite-tuning promises holds (see :class:`Gaps`).
    """
    nats = {
        name: setting.perplexity.nats_per_token
        for name, setting in settings.items()
        if setting.perplexity is not None
    }
    metric: GapMetric = "nats_per_token" if nats else "task_score"
    # Higher is better from here on.
    goodness = {name: -value for name, value in nats.items()} if nats else _mean_scores(settings)
    tasks = sorted({task for setting in settings.values() for task in setting.tasks})
    return EvaluationResult(
        settings={name: settings.get(name) for name in SETTINGS},
        gap_metric=metric,
        gaps=gaps(goodness),
        task_gaps={task: gaps(_scores(settings, task)) for task in tasks},
        bound_share=share(goodness, "bound"),
        fine_tuned_share=share(goodness, "full_fine_tuned"),
        recipe=recipe,
        versions=_versions(),
        date=now(),
        seconds=seconds,
    )


def gaps(goodness: Mapping[str, float]) -> Gaps:
    """Return the utility and the privacy gap of scores where higher is better."""
    return Gaps(
        utility=_difference(goodness, "full_fine_tuned", "plug_in"),
        privacy=_difference(goodness, "plug_in", "emulator_fine_tuned"),
    )


def share(goodness: Mapping[str, float], of: str) -> float | None:
    """Return the part of another setting's gain over full zero-shot that the plug-in reaches."""
    reached = _difference(goodness, "plug_in", "full_zero_shot")
    possible = _difference(goodness, of, "full_zero_shot")
    # A share of no gain, or of a loss, is no share.
    return None if reached is None or possible is None or possible <= 0 else reached / possible


def _difference(goodness: Mapping[str, float], better: str, worse: str) -> float | None:
    if better not in goodness or worse not in goodness:
        return None
    return goodness[better] - goodness[worse]


def _scores(settings: Mapping[str, SettingResult], task: str) -> dict[str, float]:
    scores = {name: _main_score(s.tasks.get(task, {})) for name, s in settings.items()}
    return {name: score for name, score in scores.items() if score is not None}


def _main_score(metrics: Mapping[str, float]) -> float | None:
    name = main_metric(metrics)
    return None if name is None else metrics[name]


def _mean_scores(settings: Mapping[str, SettingResult]) -> dict[str, float]:
    means = {name: mean_score(setting.tasks.values()) for name, setting in settings.items()}
    return {name: mean for name, mean in means.items() if mean is not None}


def mean_score(tasks: Iterable[Mapping[str, float]]) -> float | None:
    """Return the mean of the tasks' main scores; None where none has one."""
    scores = [score for score in map(_main_score, tasks) if score is not None]
    return sum(scores) / len(scores) if scores else None


def _versions() -> dict[str, str]:
    found = {"offsite_ray": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
