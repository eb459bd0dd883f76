# SPDX-License-Identifier: Apache-2.0
"""The benchmark of large models: its checkpoints, its arithmetic, its results, its page."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from transformers import AutoConfig

from benchmarks.checkpoints import (
    CHECKPOINTS,
    random_bf16,
    write_checkpoint,
    write_random_adapter,
)
from benchmarks.outofcore import PAGE, RESULTS, measured, tasks
from benchmarks.outofcore_page import BEGIN, grown_bytes, seconds, tables
from benchmarks.page import END, put
from offsite_ray.architectures import empty_model
from offsite_ray.results import to_plain
from tests.stock import cut

if TYPE_CHECKING:
    from pathlib import Path

RESULT = RESULTS / "outofcore.json"


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("opt-6.7b", 6_658_473_984),
        ("bloom-7.1b", 7_069_016_064),
        ("llama-2-7b", 6_738_415_616),
    ],
)
def test_a_checkpoint_has_the_shape_of_the_published_one(name: str, num_parameters: int) -> None:
    checkpoint = CHECKPOINTS[name]
    for sizes in (checkpoint.config, {**checkpoint.config, **checkpoint.tiny}):
        model = empty_model(AutoConfig.for_model(checkpoint.family, **sizes))
        counted = sum(parameter.numel() for parameter in model.parameters())
        assert (counted == num_parameters) is (sizes is checkpoint.config)
        assert counted == num_parameters or counted < 2 * 10**6


@pytest.mark.parametrize("count", [0, 1, 1000, 2**23 + 5])
def test_random_weights_are_small_and_finite(count: int) -> None:
    bits = np.frombuffer(b"".join(random_bf16(1, count)()), dtype=np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    assert len(values) == count
    assert ((np.abs(values) >= 1 / 128) & (np.abs(values) < 1 / 64)).all()
    assert count < 1000 or len(np.unique(values)) > 200


def test_what_the_table_makes_of_the_rounds() -> None:
    rounds = [
        {
            "verb": {"seconds": 10.0 + number, "peak_bytes": 500 + number},
            "kilobytes": {"seconds": 4.0},
            "copy_seconds": 2.0 * number,
            "sync_seconds": 1.0,
        }
        for number in (1, 2, 3)
    ]
    row = {"rounds": rounds, "imports": {"peak_bytes": 300}}
    assert grown_bytes(row) == 203
    assert seconds(row) == {"process": 12, "start": 4, "work": 8, "cp": 4, "synced": 5}
    for once in rounds:
        once.update(copy_seconds=None, sync_seconds=None)
    assert seconds(row) == {"process": 12, "start": 4, "work": 8}


@pytest.mark.long
@pytest.mark.slow
def test_plug_in_is_measured(tmp_path: Path) -> None:
    checkpoint = CHECKPOINTS["tiny"]
    for place, tiny in ((tmp_path, False), (tmp_path / "tiny", True)):
        write_checkpoint(checkpoint, place / "model", tiny=tiny)
        cut(place / "model", checkpoint.plan, place / "bundle")
        write_random_adapter(place / "bundle", place / "adapter")
    titles = [task.title for task in tasks(checkpoint)]
    task = next(task for task in tasks(checkpoint) if task.title == "plug-in")
    assert titles.index("plug-in") > titles.index("compress")
    row = to_plain(measured(task, tmp_path, num_rounds=1))
    (only,) = row["rounds"]
    shards = sorted(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert shards[0] < row["written_shards_bytes"] == row["due_shards_bytes"] < sum(shards)
    assert row["written_bytes"] > row["written_shards_bytes"]
    assert row["given_bytes"] > sum(shards)
    assert only["copy_seconds"] > 0
    assert only["sync_seconds"] > 0
    # torch alone is more, and so is a process that has imported it
    assert row["imports"]["peak_bytes"] > 100 * 2**20
    assert only["verb"]["peak_bytes"] > 100 * 2**20
    assert grown_bytes(row) < 100 * 2**20
    shown = {"shape": to_plain(checkpoint), "model_bytes": sum(shards), "rows": [row]}
    result = {"tiny": next(iter(json.loads(RESULT.read_text("utf-8")).values())) | shown}
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n{END}\n")
    put(page, BEGIN, tables(result))
    assert page.read_text() == f"before\n{BEGIN}\n\n{tables(result)}\n{END}\nafter\n{END}\n"
    assert "| plug-in |" in tables(result)


def test_the_page_shows_the_result_in_the_repository() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = tables(json.loads(RESULT.read_text("utf-8")))
    assert text.split(BEGIN)[1].split(END)[0].strip() == shown.strip()
