# SPDX-License-Identifier: Apache-2.0
"""What a sweep is going to run: plain values, without a model and without Ray."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.cli.arguments import parse
from offsite_ray.cli.verbs import VERBS
from offsite_ray.config import SweepConfig
from offsite_ray.errors import ConfigError, PlanError
from offsite_ray.finetuning import FINETUNING_METHODS
from offsite_ray.tune.checks import check_space, workers_per_trial
from offsite_ray.tune.plan import Job, Planner, controls
from offsite_ray.tune.presets import PRESETS
from offsite_ray.tune.space import (
    Range,
    draw,
    grid,
    may_distil,
    parse_space,
    settings_of,
    stage_fields,
)

if TYPE_CHECKING:
    from pathlib import Path

FINETUNE = {"max_steps": 2, "learning_rate": "1e-3"}
GIVEN: dict[str, Any] = {"model": "m", "private": ("p",), "text": ("t",), "out": "o"}


def planner(num_blocks: int = 6, seeds: int = 1, **baseline: Any) -> Planner:
    return Planner(num_blocks=num_blocks, seeds=range(seeds), baseline=baseline)


def space(**plain: Any) -> list[Any]:
    return parse_space({"compress": {"plan": "1-2-1"}, "finetune": FINETUNE, **plain})


def test_a_grid_has_every_combination_once() -> None:
    points = grid(
        space(
            compress={"plan": ["1-2-1", "1-3-1", "1-2-1"]},
            distill={"max_steps": [0, 4], "hidden_weight": 30},
        )
    )
    assert [(p["compress.plan"], p["distill.max_steps"]) for p in points] == [
        ("1-2-1", 0),
        ("1-2-1", 4),
        ("1-3-1", 0),
        ("1-3-1", 4),
    ]
    assert {p["distill.hidden_weight"] for p in points} == {30.0}
    assert {p["finetune.learning_rate"] for p in points} == {0.001}


def test_alternatives_are_spaces_of_their_own_over_the_rest() -> None:
    points = grid(
        space(
            any_of=[
                {"compress": {"plan": "2-1-2"}, "finetune": {"method": "lora", "rank": [2, 4]}},
                {"distill": {"max_steps": 5}},
            ]
        )
    )
    assert [p.get("finetune.rank") for p in points] == [2, 4, None]
    assert [p["compress.plan"] for p in points] == ["2-1-2", "2-1-2", "1-2-1"]
    assert [p.get("distill.max_steps") for p in points] == [None, None, 5]


def test_points_drawn_are_of_the_space_and_of_the_seed() -> None:
    variants = space(
        compress={"plan": ["1-2-1", "1-3-1"]},
        finetune={"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "max_steps": 2},
        distill={"max_steps": {"low": 3, "high": 5}},
    )
    points = draw(variants, 40, seed=1)
    assert len(points) == 40
    assert points == draw(variants, 40, seed=1)
    assert points != draw(variants, 40, seed=2)
    rates = [float(str(p["finetune.learning_rate"])) for p in points]
    assert 1e-5 <= min(rates) < 1e-4 < 1e-3 < max(rates) <= 1e-2
    assert {p["distill.max_steps"] for p in points} == {3, 4, 5}
    assert {p["compress.plan"] for p in points} == {"1-2-1", "1-3-1"}


def test_no_more_points_are_drawn_than_there_are() -> None:
    points = draw(space(compress={"plan": ["1-2-1", "1-3-1", "2-1-2"]}), 10, seed=0)
    assert len(points) == 3


def test_a_range_of_orders_of_magnitude_is_even_in_them() -> None:
    chance = random.Random(0)
    drawn = [Range(low=1.0, high=100.0, log=True).draw(chance) for _ in range(2000)]
    assert 0.45 < sum(value < 10 for value in drawn) / 2000 < 0.55


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"compres": {}}, "unknown part of the space 'compres'; did you mean 'compress'?"),
        ({"compress": {"pln": "1-2-1"}}, "unknown knob of compress 'pln'; did you mean 'plan'?"),
        ({"finetune": {"seed": [1]}}, "(the sweep sets it)"),
        ({"finetune": {"max_steps": [1.5]}}, "finetune.max_steps=1.5 is not a value"),
        ({"finetune": {"learning_rate": "fast"}}, "finetune.learning_rate='fast'"),
        ({"finetune": {"max_steps": []}}, "finetune.max_steps has no value"),
        ({"finetune": {"method": {"low": 1, "high": 2}}}, "is of a number"),
        ({"finetune": {"rank": {"low": 4, "high": 2}}}, "low=4 and high=2 make no range"),
        ({"finetune": {"rank": {"low": 1, "hi": 2}}}, "unknown part of the range"),
        ({"finetune": {"rank": {"low": 0, "high": 2, "log": True}}}, "make no range"),
        ({"finetune": "full"}, "finetune in the space must have fields"),
        ({"any_of": {}}, "any_of must be a list"),
    ],
)
def test_a_mistake_in_the_space_is_named(plain: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space(**plain)
    assert said in str(caught.value)


def test_a_space_needs_a_plan_and_a_grid_values() -> None:
    with pytest.raises(ConfigError, match=r"no compress\.plan"):
        parse_space({"finetune": FINETUNE})
    with pytest.raises(ConfigError, match=r"finetune\.rank is a range"):
        grid(space(finetune={"rank": {"low": 1, "high": 2}}))
    with pytest.raises(ConfigError, match="more than 100000"):
        grid(space(finetune={"max_steps": list(range(1, 500)), "rank": list(range(1, 500))}))
    with pytest.raises(ConfigError, match="must be one value here"):
        stage_fields("finetune", {"rank": [1, 2]})


def test_jobs_are_yardsticks_then_points_by_seed_each_once() -> None:
    points = grid(space(distill={"max_steps": [0, 4]}))
    jobs = planner(seeds=2).jobs(points)
    assert len({job.id for job in jobs}) == len(jobs)
    assert [job.role for job in jobs][:5] == ["full", *["fine_tuned"] * 2, *["bound"] * 2]
    emulators = jobs[5:]
    # a short plan with the default selection is its own uniform control
    assert [(j.control, j.seed, "distill" in j.settings) for j in emulators] == [
        ("uniform", 0, False),
        ("tail", 0, False),
        ("uniform", 0, True),
        ("tail", 0, True),
        ("uniform", 1, False),
        ("tail", 1, False),
        ("uniform", 1, True),
        ("tail", 1, True),
    ]
    bound = next(job for job in jobs if job.role == "bound")
    assert bound.settings["compress"] == {"plan": "adapter=0,5 emulator=1,2,3,4"}
    assert bound.settings["finetune"] == {"max_steps": 2, "learning_rate": 0.001}


def test_controls_have_the_same_size_and_placement() -> None:
    plan = planner(12).resolved({"plan": "adapter=0,5,11 emulator=2,8,9"})
    found = {name: planner(12).resolved(fields) for name, fields in controls(plan).items()}
    assert found["tail"].emulator == (1, 2, 3)
    assert found["uniform"].emulator == (1, 6, 10)
    assert {plan.adapter for plan in found.values()} == {(0, 5, 11)}
    assert controls(planner().resolved({"plan": "1-4-1"})) == {}
    assert controls(planner().resolved({"plan": "1-0-1"})) == {}


@pytest.mark.parametrize("plan", ["both=4 keep=4", "spread=4 keep=6", "adapter=0,5 keep=3"])
@pytest.mark.parametrize(("select", "own"), [("uniform", 2), ("tail", 2), ("angular", 3)])
def test_a_point_that_is_its_own_control_runs_once(plan: str, select: str, own: int) -> None:
    (point,) = grid(space(compress={"plan": plan, "select": select}))
    found = {job.id: job for job in planner(12).jobs([point]) if job.role == "emulator"}
    assert len(found) == own
    assert found[planner(12).own(point, 0).id].control == (select if own == 2 else None)


def test_a_point_that_is_its_own_bound_is_not_run() -> None:
    points = grid(
        space(
            compress={"plan": ["1-4-1", "1-2-1", "adapter=0-5 emulator="]},
            distill={"max_steps": [0, 4]},
            any_of=[{}, {"compress": {"compress": "prune:0.5"}}],
        )
    )

    def run(of: Planner) -> list[tuple[object, bool, bool]]:
        jobs = [job.settings for job in of.jobs(points) if job.role == "emulator"]
        told = [(s["compress"]["plan"], "compress" in s["compress"], "distill" in s) for s in jobs]
        return [row for row in told if row[0] != "1-2-1"]

    every = [
        (plan, pruned, distilled)
        for pruned in (False, True)
        for plan in ("1-4-1", "adapter=0-5 emulator=")
        for distilled in (False, True)
    ]
    assert run(planner()) == [row for row in every if row[1] or row[2]]
    own_bounds = planner(seeds=2).not_run(points)
    assert [(j.settings["compress"], j.seed) for j in own_bounds] == [
        ({"plan": plan}, seed) for plan in ("1-4-1", "adapter=0-5 emulator=") for seed in (0, 1)
    ]
    assert planner(method="full", max_steps=2).not_run(points) == planner().not_run(points)
    other = planner(learning_rate=0.1)
    assert run(other) == every
    assert other.not_run(points) == []


def test_what_a_trial_does_not_distil_is_one_point_whatever_the_losses() -> None:
    jobs = planner().jobs(grid(space(distill={"max_steps": 0, "hidden_weight": [0.0, 30.0]})))
    assert sum(job.role == "emulator" and job.control == "uniform" for job in jobs) == 1


def test_points_of_one_placement_share_their_bound_and_all_share_full_fine_tuning() -> None:
    points = grid(
        space(
            compress={"plan": ["1-2-1", "1-1-1", "2-1-2"]},
            finetune={**FINETUNE, "method": ["full", "lora"], "rank": [2, 4]},
        )
    )
    roles = [job.role for job in planner().jobs(points)]
    assert roles.count("fine_tuned") == 1
    assert roles.count("bound") == 2 * 2 * 2
    shared = planner(method="full", rank=8, learning_rate=0.1).jobs(points)
    assert [job.role for job in shared].count("bound") == 2
    assert [job.settings["finetune"]["learning_rate"] for job in shared[1:2]] == [0.1]


@pytest.mark.parametrize(
    ("compress", "distill", "shared"),
    [
        ({}, None, True),
        ({"compress": "prune:2:4"}, None, True),
        ({"select": "block_influence"}, None, False),
        ({"compress": "low_rank_aware:0.5"}, None, False),
        ({}, {"max_steps": 5}, False),
    ],
)
def test_seeds_share_an_emulator_that_draws_nothing(
    compress: dict[str, str], distill: dict[str, int] | None, shared: bool
) -> None:
    given = {"compress": {"plan": "1-2-1", **compress}}
    points = grid(space(**given, **({"distill": distill} if distill else {})))
    own = [planner(seeds=2).own(points[0], seed) for seed in (0, 1)]
    assert len({job.id for job in own}) == 2
    assert len({job.emulator for job in own}) == (1 if shared else 2)


def test_a_job_keeps_its_name_and_comes_back_from_json() -> None:
    (job,) = (j for j in planner().jobs(grid(space())) if j.control == "tail")
    again = Job.from_plain(job.to_plain())
    assert again == job
    assert again.id == job.id
    other = Job(role=job.role, settings=job.settings, seed=1)
    assert other.point == job.point
    assert other.id != job.id


def test_a_value_that_is_the_default_is_no_other_point() -> None:
    spelled = {"compress.plan": "1-2-1", "compress.compress": "none", "finetune.rank": 8}
    assert settings_of(spelled) == settings_of({"compress.plan": "1-2-1"})  # type: ignore[arg-type]


def test_a_plan_or_a_value_that_cannot_be_is_refused_before_anything_runs() -> None:
    with pytest.raises(PlanError, match="needs 7 blocks"):
        planner().jobs(grid(space(compress={"plan": "3-2-2"})))
    with pytest.raises(ConfigError, match=r"batch_size=0"):
        planner().jobs(grid(space(finetune={"batch_size": 0})))
    with pytest.raises(ConfigError, match=r"method='lorra'"):
        planner().jobs(grid(space(finetune={"method": "lorra"})))
    with pytest.raises(PlanError, match="unknown selection method 'unifrom'"):
        planner().jobs(grid(space(compress={"plan": "1-2-1", "select": "unifrom"})))
    with pytest.raises(ConfigError, match="'prun'"):
        planner().jobs(grid(space(compress={"plan": "1-2-1", "compress": "prun:1"})))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("num_blocks", [6, 16, 24, 32])
def test_a_preset_fits_any_model(name: str, num_blocks: int) -> None:
    variants = parse_space({"finetune": FINETUNE}, PRESETS[name].variants(num_blocks))
    jobs = planner(num_blocks).jobs(grid(variants))
    plans = {planner(num_blocks).resolved(job.settings["compress"]) for job in jobs[3:]}
    if name == "figure3":
        assert all(plan.keeps_every_block for plan in plans)
    else:
        assert {plan.adapter for plan in plans} == {(0, 1, num_blocks - 2, num_blocks - 1)}


def test_the_presets_are_the_papers() -> None:
    placed = grid(parse_space({}, PRESETS["figure3"].variants(24)))
    assert [p["compress.plan"] for p in placed][:6] == [
        "2-22-0", "0-22-2", "1-22-1", "4-20-0", "0-20-4", "2-20-2",
    ]  # fmt: skip
    dropped = grid(parse_space({}, PRESETS["figure4"].variants(24)))
    assert [p["compress.plan"] for p in dropped][:10] == [f"2-{n}-2" for n in range(20, 0, -2)]
    methods = grid(parse_space({}, PRESETS["table5"].variants(24)))
    assert [p["finetune.method"] for p in methods] == list(FINETUNING_METHODS)
    assert {p["compress.plan"] for p in methods} == {"2-8-2"}
    with pytest.raises(ConfigError, match="needs 6"):
        PRESETS["figure4"].variants(5)


def test_a_preset_keeps_what_it_does_not_distil() -> None:
    changed = {"finetune": FINETUNE, "distill": {"max_steps": 7}}
    points = grid(parse_space(changed, PRESETS["table4"].variants(24)))
    assert [p["distill.max_steps"] for p in points] == [0, 7, 7, 7]
    assert len({p.get("distill.hidden_weight") for p in points[1:]}) == 2
    variants = space(distill={"max_steps": [0], "lm_weight": 0.5})
    assert not any(map(may_distil, variants))
    assert all(map(may_distil, space(distill={"max_steps": [0, 5]})))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": ()}, "nothing to measure"),
        ({"space": None}, "nothing to try"),
        ({"objectives": ("plug-in",)}, "did you mean 'plug_in'?"),
        ({"objectives": ()}, "objectives is empty"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"reduction_factor": 1}, "reduction_factor=1 must be at least 2"),
        ({"num_cpus": 0.0}, "num_cpus=0.0 must be a positive number"),
        ({"num_gpus": -1.0}, "num_gpus=-1.0"),
        ({"privacy_weight": 1.5}, "privacy_weight=1.5 must be from 0 to 1"),
        ({"search": "random"}, "num_points=None with search=random: it is needed"),
        ({"num_points": 3}, "num_points=3 with search=grid: it is for random and optuna"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SweepConfig(**{**GIVEN, "space": {"compress": {"plan": "1-2-1"}}, **changes})
    assert said in str(caught.value)


def test_the_space_is_read_from_yaml_and_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "model: m\nprivate: p.txt\ntext: [t.txt]\nseeds: 3\n"
        "space:\n  compress: {plan: [1-2-1, 1-3-1]}\n  finetune: {learning_rate: 1e-3}\n"
    )
    words = ["--config", str(file), "--out", "o"]
    config = parse(VERBS["sweep"], words, VERBS).config
    assert config.space["compress"] == {"plan": ["1-2-1", "1-3-1"]}
    assert (config.seeds, config.private, config.preset) == (3, ("p.txt",), None)
    changed = [*words, "--preset", "figure3", "--space", "{compress: {plan: 2-1-2}}"]
    config = parse(VERBS["sweep"], changed, VERBS).config
    assert (config.preset, config.space) == ("figure3", {"compress": {"plan": "2-1-2"}})
    for wrong in ("--space=plan", "--preset=figure9"):
        with pytest.raises(ConfigError, match="must be"):
            parse(VERBS["sweep"], [*words, wrong], VERBS)


def test_planning_needs_no_ray() -> None:
    code = (
        "import sys, offsite_ray.tune.plan, offsite_ray.tune.space, offsite_ray.tune.run;"
        "sys.exit('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_early_stopping_is_refused_where_workers_of_their_own_distil() -> None:
    variants = space(distill={"max_steps": 4, "num_workers": [0, 2]})
    given = {**GIVEN, "public": ("p",), "space": {"compress": {"plan": "1-2-1"}}}
    check_space(variants, SweepConfig(**given))
    with pytest.raises(ConfigError, match=r"early_stop with distill\.num_workers=2"):
        check_space(variants, SweepConfig(**given, early_stop=True))
    only_finetune = space(finetune={"num_workers": 2}, distill={"max_steps": 4})
    check_space(only_finetune, SweepConfig(**given, early_stop=True))
    with pytest.raises(ConfigError, match="the space distils"):
        check_space(variants, SweepConfig(**{**given, "public": ()}))


def test_the_workers_of_a_trial_are_known_before() -> None:
    alternatives = [{"distill": {"num_workers": [0, 3]}}, {"finetune": {"num_workers": 2}}]
    assert workers_per_trial(space(any_of=alternatives)) == {"distill": 3, "finetune": 2}
    assert not any(workers_per_trial(space(distill={"max_steps": 0, "num_workers": 3})).values())
    with pytest.raises(ConfigError, match=r"distill\.num_workers is a range"):
        workers_per_trial(space(distill={"num_workers": {"low": 1, "high": 2}}))
