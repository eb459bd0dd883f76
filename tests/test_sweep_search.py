# SPDX-License-Identifier: Apache-2.0
"""Where the jobs of a sweep come from: lists, and what Optuna asks for; nothing is run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.tune.plan import Planner
from offsite_ray.tune.search import VARIANT, Listed, Suggested, asked_points, parameters_of
from offsite_ray.tune.space import every_value, grid, parse_space

if TYPE_CHECKING:
    from pathlib import Path

PLANNER = Planner(num_blocks=6, seeds=[0], baseline={})


def space(*plans: str, **finetune: Any) -> list[Any]:
    return parse_space({"compress": {"plan": [*plans]}, "finetune": {"max_steps": 2, **finetune}})


def suggested(variants: list[Any], num_points: int, memory: Path) -> Suggested:
    pytest.importorskip("optuna", reason="optuna is not installed")
    return Suggested(variants, PLANNER, num_points, 0, {}, lambda _: [1.0], ["maximize"], memory)


def test_a_source_is_done_when_the_last_job_it_gave_has_come_to_an_end() -> None:
    source = Listed(PLANNER.jobs(grid(space("1-2-1")))[:2])
    given = [source.next(), source.next()]
    assert (source.next(), source.exhausted, source.done) == (None, True, False)
    for job in filter(None, given):
        assert not source.done
        source.told({"id": job.id, "status": "finished"})
    assert source.done


def test_a_job_whose_emulator_is_being_made_is_put_off_for_others() -> None:
    points = grid(space("1-2-1", learning_rate=[0.1, 0.2], method=["full", "lora"]))
    jobs = [job for job in PLANNER.jobs(points) if job.role == "emulator"]
    uniform = [job for job in jobs if job.control == "uniform"]
    tail = [job for job in jobs if job.control == "tail"]
    source = Listed(jobs)
    assert [source.next(), source.next()] == [uniform[0], tail[0]]
    # none is free now; one that waits is better than nothing
    assert source.next() == uniform[1]
    source.told({"id": tail[0].id, "status": "finished"})
    assert [source.next(), source.next()] == tail[1:3]
    for failed in uniform[:2]:
        source.told({"id": failed.id, "status": "failed"})
    # who comes next makes it
    assert [source.next(), source.next(), source.next()] == [uniform[2], tail[3], uniform[3]]
    assert source.next() is None


def test_every_value_is_looked_at_with_both_ends_of_ranges() -> None:
    variants = space("1-2-1", "1-3-1", rank={"low": 2, "high": 8})
    points = every_value(variants)
    assert [(point["compress.plan"], point["finetune.rank"]) for point in points] == [
        ("1-2-1", 2),
        ("1-3-1", 2),
        ("1-2-1", 8),
    ]


def test_a_remembered_point_is_found_wherever_its_values_stand_now() -> None:
    point = {"compress.plan": "1-2-1", "finetune.max_steps": 2, "finetune.rank": 4}
    now = [*space("1-2-1"), *space("1-3-1", "1-2-1", rank={"low": 2, "high": 8})]
    found = {VARIANT: 1, "1.compress.plan": 1, "1.finetune.rank": 4}
    assert parameters_of(json.loads(json.dumps(point)), now) == found
    assert parameters_of(point, space("1-3-1", "2-1-2", rank=[2, 4])) is None
    assert parameters_of(point, space("1-2-1", rank={"low": 5, "high": 8})) is None
    assert parameters_of(point, space("1-2-1", rank=[8, 4])) == {VARIANT: 0, "0.finetune.rank": 1}


def test_a_point_that_is_its_own_bound_is_asked_for_and_not_run(tmp_path: Path) -> None:
    variants, memory = space("1-4-1"), tmp_path / "asked.json"
    source = suggested(variants, 2, memory)
    given = [source.next() for _ in range(4)]
    assert [job.role for job in given if job] == ["full", "fine_tuned", "bound"]
    for job in filter(None, given):
        source.told({"id": job.id, "status": "finished"})
    assert source.done
    points = asked_points(memory, PLANNER)
    assert [job.settings["compress"] for job in PLANNER.not_run(points)] == [{"plan": "1-4-1"}]


def test_optuna_asks_for_the_remembered_points_that_the_space_still_has(tmp_path: Path) -> None:
    memory = tmp_path / "asked.json"
    source = suggested(space("1-1-1", "1-2-1", "1-3-1"), 6, memory)
    given = []
    while (job := source.next()) is not None:
        given.append(job.id)
        source.told({"id": job.id, "status": "finished"})
    plans = [point["compress.plan"] for point in json.loads(memory.read_text())]
    assert len(plans) == 6
    assert source.done
    kept = [plan for plan in plans if plan != plans[0]]
    assert kept
    source = suggested(space("2-1-2", *sorted(set(kept), reverse=True)), len(kept), memory)
    while (job := source.next()) is not None:
        assert job.id in given
        source.told({"id": job.id, "status": "finished"})
    assert source.done


def test_a_point_that_cannot_be_run_ends_no_sweep(tmp_path: Path) -> None:
    source = suggested(space("4-2-1", "3-3-1"), 3, tmp_path / "asked.json")
    assert source.next() is None
    assert source.done


def test_as_many_points_are_out_as_there_is_room_for(tmp_path: Path) -> None:
    rates = {"low": 1e-4, "high": 1e-2, "log": True}
    source = suggested(space("1-2-1", learning_rate=rates), 5, tmp_path / "asked.json")
    out = []
    while (job := source.next()) is not None:
        out.append(job)
    assert len({job.point for job in out if job.role == "emulator" and job.control != "tail"}) == 5
    assert (source.exhausted, source.done) == (True, False)


def test_optuna_waits_for_a_point_that_it_asks_for_again(tmp_path: Path) -> None:
    source = suggested(space("1-2-1"), 3, tmp_path / "asked.json")
    out = []
    while (job := source.next()) is not None:
        out.append(job)
    assert not source.exhausted
    for job in out:
        source.told({"id": job.id, "status": "finished"})
    assert source.next() is None
    assert source.done
