# SPDX-License-Identifier: Apache-2.0
"""The benchmark of prepare: what it runs, and what its page says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.prepare import TOKENIZER, Result, Row, main
from benchmarks.prepare_page import tables
from benchmarks.prepare_run import Job, measure
from offsite_ray.data import parts
from offsite_ray.results import to_plain
from tests.texts import write_rows

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_both_ways_make_the_same_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PART_BYTES", 50_000)
    source = write_rows(tmp_path / "a.jsonl", [{"text": "The cat sat. " * 40}] * 400)
    rows = []
    for workers in (0, 2):
        job = Job(
            source=str(source),
            small_source=str(source),
            tokenizer=str(TOKENIZER),
            block_size=64,
            num_workers=workers,
            out=str(tmp_path / f"out-{workers}"),
        )
        run = measure(job)
        assert len(run.worker_bytes) == workers
        assert run.read_bytes >= run.process_bytes > 100 * MIB
        assert all(peak > 100 * MIB for peak in run.worker_bytes)
        rows.append(Row(num_workers=workers, text_bytes=source.stat().st_size, runs=(run,)))
    here, there = (row.runs[0] for row in rows)
    assert (there.digest, there.num_tokens) == (here.digest, here.num_tokens)
    result = Result(
        date="2026-11-21",
        commit=None,
        machine={"cpu": "a processor", "num_cores": 2, "memory_bytes": 2**34, "system": "Linux"},
        versions={"python": "3.11"},
        text="sentences",
        block_size=64,
        rows=tuple(rows),
    )
    page = tables(to_plain(result))
    ratio = here.seconds / there.seconds
    cells = [line.split(" | ") for line in page.splitlines() if line.startswith("| 2 workers")]
    assert cells[0][5] == f"{ratio:.2f}"
    assert cells[1][3] == f"{max(there.worker_bytes) / MIB:,.0f} MiB"


def test_its_help_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--scratch" in capsys.readouterr().out
