# SPDX-License-Identifier: Apache-2.0
"""Which distillations of a sweep are stopped early, by what they have come to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.errors import ConfigError
from offsite_ray.tune.halving import Halving, behind, check_proxy
from offsite_ray.tune.plan import Job, Planner

if TYPE_CHECKING:
    from pathlib import Path

PLANNER = Planner(num_blocks=6, seeds=range(1), baseline={})


def test_a_loss_is_behind_where_it_is_not_among_the_best_third() -> None:
    assert not behind(9.0, [9.0, 1.0], 3)
    assert behind(9.0, [9.0, 1.0, 2.0], 3)
    assert behind(2.0, [9.0, 1.0, 2.0], 3)
    assert not behind(1.0, [9.0, 1.0, 2.0], 3)
    assert not behind(2.0, [9.0, 1.0, 2.0, 3.0, 4.0, 5.0], 3)


def halving(folder: Path, proxy: str = "lm") -> Halving:
    return Halving(
        folder=str(folder), grace_steps=4, reduction_factor=3, proxy=proxy, planner=PLANNER
    )


def a_job(seed: int, plan: str = "1-2-1", control: str | None = None, **distill: Any) -> Job:
    settings = {"compress": {"plan": plan}, "distill": {"max_steps": 36, **distill}}
    return Job(role="emulator", settings=settings, seed=seed, control=control)


def test_rungs_are_compared_at_equal_steps_also_after_a_restart(tmp_path: Path) -> None:
    assert [halving(tmp_path).rung(step) for step in (3, 4, 11, 12, 36)] == [None, 4, 4, 12, 36]
    losses = [3.0, 1.0, 2.0, 0.5]
    assert [halving(tmp_path).stops(a_job(i), 4, {"lm": x}) for i, x in enumerate(losses)] == [
        False,  # too few to be compared with
        False,
        True,
        False,
    ]
    assert not halving(tmp_path).stops(a_job(4), 4, {"loss": 9.0})  # nothing is known of its proxy
    assert not halving(tmp_path).stops(a_job(4), 3, {"lm": 9.0})  # before the first rung
    assert not halving(tmp_path).stops(a_job(5, control="tail"), 4, {"lm": 9.0})
    assert halving(tmp_path).stops(a_job(4), 4, {"lm": 8.0})


def test_a_job_is_judged_on_arrival_at_a_rung_and_not_between_rungs(tmp_path: Path) -> None:
    assert not halving(tmp_path).stops(a_job(0), 4, {"lm": 3.0})
    for seed in (1, 2):
        halving(tmp_path).stops(a_job(seed), 4, {"lm": 1.0 + seed})
    # better ones have come since, and the job is better itself by now
    assert not halving(tmp_path).stops(a_job(0), 6, {"lm": 9.0})
    assert not halving(tmp_path).stops(a_job(0), 11, {"lm": 0.1})


@pytest.mark.parametrize(
    "other", [{"plan": "1-3-1"}, {"max_steps": 12}, {"max_steps": None, "epochs": 2}]
)
def test_only_equals_are_compared(tmp_path: Path, other: dict[str, Any]) -> None:
    for seed in range(3):
        halving(tmp_path).stops(a_job(seed), 4, {"lm": 1.0})
    assert not halving(tmp_path).stops(a_job(3, **other), 4, {"lm": 9.0})
    # what else is different is what is compared
    assert halving(tmp_path).stops(a_job(3, learning_rate=1.0), 4, {"lm": 9.0})


def test_losses_are_compared_with_those_of_the_same_part(tmp_path: Path) -> None:
    for seed in range(3):
        halving(tmp_path, "lm").stops(a_job(seed), 4, {"lm": 1.0, "hidden": 8.0})
    assert not halving(tmp_path, "hidden").stops(a_job(3), 4, {"lm": 1.0, "hidden": 9.0})
    with pytest.raises(ConfigError, match="unknown proxy 'hiden'; did you mean 'hidden'"):
        check_proxy("hiden")
