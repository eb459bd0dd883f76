# SPDX-License-Identifier: Apache-2.0
"""The results of a sweep: the front, the table for other tools, what became of each job."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.errors import TrainingError
from offsite_ray.selection import uniform
from offsite_ray.split import parse_plan
from offsite_ray.tune import sweep
from offsite_ray.tune.attempts import Silent
from offsite_ray.tune.folders import Folders
from offsite_ray.tune.front import chosen, dominates, front, how_much_to_distil, most_worth, worth
from offsite_ray.tune.plan import Job, Planner
from offsite_ray.tune.table import (
    COLUMNS,
    Summary,
    records_of_bounds,
    rows_of,
    summaries,
    write_table,
)
from offsite_ray.tune.trial import base_record
from tests.conftest import ROOT
from tests.sweeps import a_config

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from offsite_ray.tune.space import Point
    from tests.loops import Loop

OBJECTIVES = ("plug_in", "emulator", "bytes")


def a_row(point: str, seed: int = 0, **values: Any) -> dict[str, Any]:
    row = dict.fromkeys(COLUMNS) | {
        "id": f"emulator-{point}-seed{seed}", "point": point, "role": "emulator",
        "status": "finished", "seed": seed, "plan": "2-4-2", "select": "uniform",
        "compress": "none", "distill_steps": 0, "num_emulator_blocks": 4, "bundle_bytes": 100,
        "method": "full", "num_blocks": 8, "bound_nats": 1.0, "date": "2025-01-31T12:00:00Z",
    }  # fmt: skip
    return {**row, **values}


def points(**nats: tuple[float, float, int]) -> list[Summary]:
    """Return points by name: nats of plug-in and tuned emulator, and bytes."""
    return summaries(
        a_row(
            name,
            plug_in_nats=plug_in,
            emulator_fine_tuned_nats=emulator,
            bundle_bytes=size,
            bound_gap=plug_in - 1.0,
            privacy_gap=emulator - plug_in,
        )
        for name, (plug_in, emulator, size) in nats.items()
    )


def names(found: list[Summary]) -> set[str]:
    return {point.point for point in found}


def test_the_front_has_what_nothing_beats_in_everything() -> None:
    found = points(
        good=(2.0, 3.0, 50), small=(3.0, 3.0, 10), private=(2.5, 9.0, 50), bad=(3.0, 2.9, 60),
        same=(2.0, 3.0, 50),
    )  # fmt: skip
    assert names(front(found, OBJECTIVES)) == {"good", "same", "small", "private"}
    assert names(front(found, ["plug_in"])) == {"good", "same"}
    assert names(front(found, ["bytes"])) == {"small"}
    assert not dominates((1.0, 1.0), (1.0, 1.0))


def test_what_was_not_measured_is_on_no_front() -> None:
    rows = [a_row("a", plug_in_nats=1.0), a_row("b", plug_in_nats=None)]
    assert names(front(summaries(rows), ["plug_in"])) == {"a"}
    assert front(summaries(rows), OBJECTIVES) == []
    assert chosen(summaries(rows), OBJECTIVES, 0.5) is None


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_the_lucky_seeds_of_a_point_compete_for_nothing(status: str) -> None:
    measured = {"emulator_fine_tuned_nats": 3.0, "bound_gap": 0.1, "privacy_gap": 0.9}
    rows = [
        a_row("lucky", 0, plug_in_nats=1.0, **measured),
        a_row("lucky", 1, status=status),
        *(a_row("whole", seed, plug_in_nats=2.0, **measured) for seed in (0, 1)),
    ]
    found = summaries(rows)
    num = {"stopped": (1, 0), "failed": (0, 1)}[status]
    assert [(point.num_stopped, point.num_failed) for point in found] == [num, (0, 0)]
    assert [point.competes for point in found] == [False, True]
    assert names(front(found, OBJECTIVES)) == names(front(found, ["plug_in"])) == {"whole"}
    best = most_worth(how_much_to_distil(found, 0.5))
    assert best is not None
    assert best.point == "whole"


def test_the_full_model_is_on_no_front_and_never_wins() -> None:
    def a_size(size: int, bound_gap: float, privacy_gap: float, **values: Any) -> dict[str, Any]:
        return a_row(
            f"{size}{values}", num_blocks=16, num_adapter_blocks=4, num_emulator_blocks=size,
            bundle_bytes=size, bound_gap=bound_gap, privacy_gap=privacy_gap,
            plug_in_nats=1.0 + bound_gap, emulator_fine_tuned_nats=1.0 + bound_gap + privacy_gap,
            **values,
        )  # fmt: skip

    found = summaries(
        [a_size(12, 0.0, 0.0), a_size(12, 0.0, 0.0, distill_steps=9), a_size(6, 0.2, 0.15),
         a_size(2, 0.5, 0.4), a_size(12, 0.3, 0.5, compress="quantize:8")]
    )  # fmt: skip
    assert [point.hands_all for point in found] == [True, True, False, False, False]
    best = front(found, OBJECTIVES)
    assert [point.row["num_emulator_blocks"] for point in best] == [6, 2, 12]
    for few in (found[:4], found[:2]):
        won, knob = chosen(few, OBJECTIVES, 0.5), most_worth(how_much_to_distil(few, 0.5))
        sizes = [p and p.point for p in (won, knob)]
        assert sizes == ([found[2].point] * 2 if len(few) > 2 else [None, None])


def test_the_winner_follows_the_weight_of_privacy() -> None:
    found = points(useful=(1.1, 1.2, 50), private=(1.6, 3.0, 50), middle=(1.3, 2.0, 50))
    won = {w: chosen(found, OBJECTIVES, w) for w in (0.0, 0.4, 1.0)}
    assert {w: p.point for w, p in won.items() if p} == {
        0.0: "useful",
        0.4: "private",
        1.0: "private",
    }
    assert worth(0.6, 1.4, 0.25) == pytest.approx(0.25 * 1.4 - 0.75 * 0.6)
    assert worth(0.2, None, 0.0) is worth(None, 0.2, 0.0) is None
    only = chosen(found, ["plug_in"], 1.0)
    assert only is not None
    assert only.point == "useful"


def test_rivals_are_judged_by_the_best_bound_and_not_each_by_its_own() -> None:
    def won(*bounds: float | None) -> str:
        found = summaries(
            a_row(f"{i}", plug_in_nats=plug_in, emulator_fine_tuned_nats=plug_in + 0.1,
                  bound_nats=bound, privacy_gap=0.1, full_fine_tuned_nats=0.9)
            for i, (plug_in, bound) in enumerate(zip((1.5, 1.2), bounds, strict=True))
        )  # fmt: skip
        best, knob = chosen(found, OBJECTIVES, 0.0), most_worth(how_much_to_distil(found, 0.0))
        assert best is not None
        assert knob is not None
        assert best.point == knob.point
        return best.point

    # the first has lost nothing, of a fine-tuning that learnt nothing
    assert won(1.5, 1.0) == "1"
    assert won(1.5, None) == "1"
    assert won(None, None) == "1"


def test_of_equals_what_was_asked_for_wins_and_the_smaller() -> None:
    same: dict[str, Any] = {"plug_in_nats": 1.2, "emulator_fine_tuned_nats": 1.4, "bound_nats": 1.0,
            "privacy_gap": 0.2}  # fmt: skip
    found = summaries(
        [
            a_row("control", control="tail", **same),
            a_row("large", bundle_bytes=101, **same),
            a_row("asked for", **same),
        ]
    )
    best, knob = chosen(found, ("plug_in",), 0.5), most_worth(how_much_to_distil(found, 0.5))
    assert best is not None
    assert knob is not None
    assert best.point == "asked for"
    assert knob.point != "control"


def test_scores_count_where_there_are_no_nats() -> None:
    rows = [
        a_row(name, plug_in_score=score, emulator_fine_tuned_score=0.3)
        for name, score in (("low", 0.4), ("high", 0.6))
    ]
    assert names(front(summaries(rows), OBJECTIVES)) == {"high"}


def test_a_point_is_the_mean_of_its_seeds_with_their_spread() -> None:
    rows = [a_row("p", seed, plug_in_nats=value) for seed, value in ((1, 3.0), (0, 1.0), (2, 2.0))]
    rows += [a_row("p", 3, plug_in_nats=9.0, status="failed")]
    (point,) = summaries(rows)
    assert point.seeds == (0, 1, 2)
    assert point.mean["plug_in_nats"] == 2.0
    assert point.spread["plug_in_nats"] == pytest.approx(1.0)
    assert point.mean["plug_in_score"] is None
    assert point.row["seed"] == 0
    (one,) = summaries(rows[:1])
    assert one.spread["plug_in_nats"] is None


def test_the_knob_goes_from_little_to_much_and_names_a_setting() -> None:
    rows = [
        a_row(f"{size}-{steps}", num_emulator_blocks=size, distill_steps=steps,
              plug_in_nats=1.4 - steps / 1000, privacy_gap=0.5 - steps / 500)
        for size, steps in ((8, 0), (4, 200), (4, 0))
    ]  # fmt: skip
    knob = how_much_to_distil(summaries(rows), 0.2)
    assert [(row.num_emulator_blocks, row.distill_steps) for row in knob] == [
        (4, 0), (4, 200), (8, 0),
    ]  # fmt: skip
    best = most_worth(knob)
    assert best is not None
    assert best.point == "4-200"
    private = most_worth(how_much_to_distil(summaries(rows), 0.8))
    assert private is not None
    assert private.distill_steps == 0
    assert most_worth([]) is None


def test_the_table_is_read_by_other_tools(tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    write_table(path, [a_row("a", plug_in_nats=1.5), a_row("b", seed=1)])
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.read_parquet(path)
    assert list(frame.columns) == list(COLUMNS)
    assert frame["plug_in_nats"].tolist()[0] == 1.5
    assert frame["plug_in_nats"].isna().tolist() == [False, True]
    assert frame["seed"].tolist() == [0, 1]


def test_the_table_is_read_by_duckdb(tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    write_table(path, [a_row("a", plug_in_nats=1.5), a_row("b", plug_in_nats=2.5)])
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    query = f"select point, plug_in_nats from '{path}' where status = 'finished' order by 2 desc"
    assert duckdb.sql(query).fetchall() == [("b", 2.5), ("a", 1.5)]


def row_of(compress: dict[str, Any], *, of: int = 16, **found: Any) -> dict[str, Any]:
    """Return the row of a finished emulator whose bundle has some blocks."""
    job = Job(role="emulator", settings={"compress": compress, "finetune": {}}, seed=0)
    record = {**base_record(job, "finished"), "found": found}
    (row,) = rows_of([record], Planner(num_blocks=of, seeds=(0,), baseline={}))
    return row


@pytest.mark.parametrize("select", ["layer_replace", "cka_cluster_shared"])
@pytest.mark.parametrize(
    ("plan", "told", "num_kept"),
    [
        ("2-4-2", "2-4-2", 4),
        ("both=4 keep=8", "2-8-2", 8),
        ("spread=4 keep=6", "spread=4 keep=6", 6),
        ("2-12-2", "2-12-2", 12),
    ],
)
def test_what_stands_in_for_dropped_blocks_is_none_of_the_emulator_blocks(
    select: str, plan: str, told: str, num_kept: int
) -> None:
    whole = parse_plan(plan, 16, uniform)
    row = row_of(
        {"plan": plan, "select": select},
        plan=dataclasses.replace(whole, emulator=whole.middle).short,
        adapter=list(whole.adapter),
        emulator=list(whole.middle),
    )
    assert (row["plan"], row["select"], row["num_emulator_blocks"]) == (told, select, num_kept)
    assert row["depth"] == 16
    assert row["emulator_blocks"] == ",".join(map(str, whole.middle))
    assert parse_plan(row["plan"], 16, uniform) == whole


def test_a_point_that_ran_beside_its_bound_keeps_its_own_row() -> None:
    planner = Planner(num_blocks=6, seeds=(0,), baseline={})
    points: list[Point] = [{"compress.plan": "1-4-1"}]
    *_, bound = planner.jobs(points)
    records = [{**base_record(bound, "finished"), "measured": {"bound": {"nats_per_token": 2.0}}}]
    (made,) = records_of_bounds(planner.not_run(points), records, planner)
    assert made["measured"]["plug_in"] == {"nats_per_token": 2.0}
    (job,) = planner.not_run(points)
    records.append(base_record(job, "finished"))
    assert records_of_bounds([job], records, planner) == []
    assert records_of_bounds([job], [base_record(bound, "failed")], planner) == []


def test_other_emulators_are_as_deep_as_their_blocks() -> None:
    found = {"plan": "1-2-1", "adapter": [0, 7], "emulator": [1, 6]}
    row = row_of({"plan": "1-2-1"}, of=8, **found)
    assert (row["plan"], row["num_emulator_blocks"], row["depth"]) == ("1-2-1", 2, 4)


@pytest.mark.parametrize(
    ("compress", "select"),
    [
        ({"plan": "spread=4 keep=6"}, "uniform"),
        ({"plan": "spread=4 keep=6", "select": "angular"}, "angular"),
        ({"plan": "adapter=0,15 keep=4", "select": "greedy"}, "greedy"),
        ({"plan": "adapter=0,15 emulator=4"}, "explicit"),
        ({"plan": "adapter=0,15 emulator=4", "select": "cka_cluster_shared"}, "cka_cluster_shared"),
    ],
)
def test_methods_are_told_apart_where_the_plan_is_spelled_out(
    compress: dict[str, Any], select: str
) -> None:
    assert row_of(compress)["select"] == select


def test_a_sweep_of_nothing_yet_has_a_table() -> None:
    assert summaries([]) == []
    assert how_much_to_distil([], 0.5) == []


def test_every_column_is_in_the_documentation() -> None:
    told = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    missing = [name for name in COLUMNS if f"`{name}`" not in told]
    measures = [name for name in missing if name.rpartition("_")[2] in ("nats", "score")]
    assert sorted(set(missing) - set(measures)) == []


def test_a_crash_is_tried_again_and_leaves_its_traceback_a_diverged_run_is_not(
    loop: Loop, tmp_path: Path
) -> None:
    class Clumsy(Silent):
        def evaluated(self, job: Job, step: int, losses: Mapping[str, float]) -> None:
            raise RuntimeError("out of luck")

    finetune = {"max_steps": 2, "batch_size": 2}
    space = {
        "compress": {"plan": "1-2-1"},
        "any_of": [
            {"distill": {"max_steps": 1, "batch_size": 2}, "finetune": finetune},
            {"finetune": {**finetune, "learning_rate": 1e38}},
        ],
    }
    config = a_config(
        loop, tmp_path / "out", space=space, retries=1, baseline={"learning_rate": 1e-3}
    )
    with pytest.raises(TrainingError, match="every emulator failed"):
        sweep(config, lambda _: None, lambda _: Clumsy())
    folders = Folders(tmp_path / "out")
    assert folders.report.is_file()
    tries = {}
    for record in folders.records():
        if record["status"] == "failed":
            told = folders.of(record["id"]) / "traceback.txt"
            crashed = told.is_file() and 'raise RuntimeError("out of luck")' in told.read_text()
            tries[record["error"].partition(":")[0], crashed] = record["attempts"]
    assert tries.pop(("RuntimeError", True)) == 2
    ((_, crashed),) = tries
    assert (crashed, *tries.values()) == (False, 1)
