# SPDX-License-Identifier: Apache-2.0
"""The short ones of the drills, on one cluster; ``make drills`` runs all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cluster.drills import disks, distilling, network, serving
from cluster.drills.lab import Plan, running_lab
from cluster.drills.page import tables
from cluster.drills.table import DRILLS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cluster.drills.lab import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(Plan(), tmp_path_factory.mktemp("lab")) as running:
        yield running


def test_a_node_is_killed_while_it_trains(lab: Lab) -> None:
    outcome = distilling.worker_killed(lab)
    print(outcome)
    assert outcome.lost == []
    assert outcome.whole_after_s is not None
    assert min(outcome.numbers["went_on_from"]) > 0


@pytest.mark.long
def test_a_node_is_killed_while_it_serves(lab: Lab) -> None:
    if lab.network is None:
        pytest.skip(f"proxies of nodes share a port here: {network.why_not()}")
    lab.mend()
    outcome = serving.worker_killed(lab)
    print(outcome)
    assert outcome.lost == []


def test_a_disk_is_small_slow_and_loses_its_power(tmp_path: Path) -> None:
    """What the drills stand on: without ``sync`` a file is lost, with it, it is not."""
    if reason := disks.why_not_slow():
        pytest.skip(reason)
    image, copy = tmp_path / "a.img", tmp_path / "b.img"
    with disks.disk(image, 8 * 2**20) as disk, disks.throttled(disk, 2**20):
        (disk / "file").write_bytes(b"x" * 2**20)
        disks.pulled_out(image, copy)
        with disks.mounted(copy) as old:
            assert not (old / "file").exists() or (old / "file").stat().st_size == 0
        filler = disks.fill(disk)
        assert disks.free_bytes(disk) == 0
        filler.unlink()
    assert not image.exists()


def test_each_drill_has_a_name_of_its_own() -> None:
    assert len({drill.name for drill in DRILLS}) == len(DRILLS)


def test_the_page_says_what_was_lost_and_what_was_not_run() -> None:
    found: dict[str, Any] = {
        "name": "n", "date": "2026-01-01", "commit": None, "done": "d", "whole": "w",
        "not_run": None, "failed": None, "lost": [],
        "cost": "c", "whole_after_s": 2.4, "numbers": {}, "seconds": 1.0,
    }  # fmt: skip
    result = {
        "machine": {"cpu": "a", "num_cores": 2, "memory_bytes": 2**30, "system": "s"},
        "versions": {"ray": "2"}, "network": "x",
        "drills": [
            found,
            {**found, "lost": ["checkpoint 3", "checkpoint 3"], "whole_after_s": None},
            {**found, "not_run": "no root"},
            {**found, "failed": "TimeoutError: it never came"},
        ],
    }  # fmt: skip
    rows = [line.split(" | ") for line in tables(result).splitlines()[-4:]]
    assert [(row[2], row[4]) for row in rows] == [
        ("nothing", "2 s"),
        ("checkpoint 3", "at once"),
        ("not run: no root", "not measured"),
        ("did not end: TimeoutError: it never came", "not measured"),
    ]
