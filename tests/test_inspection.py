# SPDX-License-Identifier: Apache-2.0
"""Inspect and verify: what they say of bundles, and of prepared data, which is none."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from offsite_ray.cli import main
from offsite_ray.config import VerifyConfig
from offsite_ray.data import write_blocks
from offsite_ray.inspection import verify
from tests.adapters import make_adapter
from tests.stock import plug

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loops import Loop


@pytest.fixture(scope="module")
def made(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an adapter, a plugged-in model and prepared data."""
    root = tmp_path_factory.mktemp("made")
    make_adapter(loop.bundle, root / "adapter", noise=0.1)
    plug(loop.model, root / "adapter", root / "plugged-in")
    write_blocks([str(loop.text)], loop.model, 16, root / "data")
    return root


@pytest.mark.parametrize("name", ["adapter", "plugged-in", "data"])
def test_verify_says_what_it_found(made: Path, loop: Loop, name: str) -> None:
    path, model = str(made / name), str(loop.model)
    alone = verify(VerifyConfig(path=path))
    assert alone.checked_against is None
    assert alone.verdict.startswith("whole and unaltered; give --model to check")
    against = verify(VerifyConfig(path=path, model=model))
    assert against.checked_against == model
    assert against.verdict.startswith("whole and unaltered, and it ")
    assert against.verdict.endswith(f" {model}")
    assert (against.id, against.num_files) == (alone.id, alone.num_files)


def test_prepared_data_is_called_that(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(made / "data")
    record = json.loads((made / "data/offsite-data.json").read_text("utf-8"))
    assert main(["inspect", data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"path": data, "kind": "prepared_data", **record}
    assert main(["inspect", data]) == 0
    assert "prepared_data" in capsys.readouterr().out
    assert main(["verify", data]) == 0
    assert "prepared_data" in capsys.readouterr().out
