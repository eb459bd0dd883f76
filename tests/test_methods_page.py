# SPDX-License-Identifier: Apache-2.0
"""The sweeps of docs/fm16, and the tables that are made of what they found."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from benchmarks.methods_page import _FAMILIES, FOLDER, NAMES, by_label, section
from offsite_ray.tune.plan import Planner
from offsite_ray.tune.space import grid, parse_space

SELECTION = _FAMILIES[0]


def a_row(select: str, seed: int, plug_in: float, **changes: Any) -> dict[str, Any]:
    compress = {"plan": "2-4-2", "select": select}
    return {
        "role": "emulator",
        "status": "finished",
        "settings": json.dumps({"compress": compress, "finetune": {}}),
        "select": select,
        "compress": "none",
        "method": "full",
        "distill_steps": 0,
        "num_adapter_blocks": 4,
        "num_emulator_blocks": 4,
        "depth": 8,
        "seed": seed,
        "plug_in_nats": plug_in,
        "emulator_zero_shot_nats": 6.0,
        "emulator_fine_tuned_nats": plug_in - 0.25,
        "bundle_bytes": 3 * 2**20,
        "bound_share": 0.5,
        "utility_gap": 0.125,
        "privacy_gap": -0.25,
        "compress_seconds": 1.5,
        "distill_seconds": None,
        **changes,
    }


ROWS = [
    {"role": "full", "full_zero_shot_nats": 5.5, "method": None},
    {"role": "fine_tuned", "full_fine_tuned_nats": 4.0, "learning_rate": 1e-3},
    {"role": "fine_tuned", "full_fine_tuned_nats": 3.5, "learning_rate": 3e-3},
    {
        "role": "bound",
        "bound_nats": 4.25,
        "adapter_blocks": "0,1,14,15",
        "method": "full",
        "learning_rate": 1e-3,
    },
    a_row("uniform", 0, 5.0),
    a_row("uniform", 1, 5.5),
    a_row("angular", 0, 4.5),
    a_row("angular", 1, 4.75),
    a_row("tail", 0, 5.5, status="stopped"),
    a_row("greedy", 0, 4.0, distill_steps=10),
]


def test_methods_are_compared_seed_by_seed_the_best_first() -> None:
    assert list(by_label(SELECTION, ROWS)) == ["uniform", "angular"]
    lines = section(SELECTION, {"Shakespeare": ROWS}).splitlines()
    assert lines[0].endswith("full model 5.500; full fine-tuning 4.000; bound 4.250.")
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    better = "+0.625 ± 0.177"
    assert cells == ["angular", "3.0", "6.000 ± 0.000", "4.375 ± 0.177", "4.625 ± 0.177", better,
                     "50%", "+0.125 ± 0.000", "-0.250 ± 0.000", "1.5 s"]  # fmt: skip
    assert [line.split(" | ")[0] for line in lines[4:6]] == ["| angular", "| uniform"]


def test_what_keeps_the_depth_of_the_full_model_says_so() -> None:
    rows = [*ROWS, a_row("layer_replace", 0, 4.5, depth=16)]
    assert list(by_label(SELECTION, rows)) == [
        "uniform", "angular", "layer_replace (as deep as the full model)",
    ]  # fmt: skip


def test_a_sweep_that_compared_nothing_has_no_table() -> None:
    assert section(SELECTION, {"Shakespeare": ROWS[:4]}) == "Not measured.\n"


@pytest.mark.parametrize("name", NAMES)
def test_the_sweeps_can_be_run(name: str) -> None:
    given = yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))
    planner = Planner(num_blocks=16, seeds=range(given["seeds"]), baseline={})
    jobs = planner.jobs(grid(parse_space(given["space"])))
    assert len([job for job in jobs if job.role == "emulator"]) >= 24
