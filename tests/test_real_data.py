# SPDX-License-Identifier: Apache-2.0
"""The loop on a model that was pretrained, with Shakespeare and ARC-Easy, by the command line."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.cli import main

if TYPE_CHECKING:
    from pathlib import Path

TRAIN = "--max-steps 12 --batch-size 4 --seq-len 128 --warmup-fraction 0.2"
MEASURE = "--text held-out.txt --tasks arc_easy --task-limit 24 --seq-len 128"


@pytest.mark.slow
def test_the_loop_on_real_text(
    real_data: Path,
    real_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    plays = (real_data / "data/shakespeare/input.txt").read_text(encoding="utf-8")
    (tmp_path / "private.txt").write_text(plays[:60_000], encoding="utf-8")
    (tmp_path / "held-out.txt").write_text(plays[-12_000:], encoding="utf-8")
    prose = (real_data / "data/wikitext2/valid.txt").read_text(encoding="utf-8")
    (tmp_path / "public.txt").write_text(prose[:60_000], encoding="utf-8")
    model = shlex.quote(str(real_model))
    arc = shlex.quote(f"arc_easy={real_data / 'data/arc_easy/test.jsonl'}")

    def run(line: str) -> Any:
        status = main([*shlex.split(line), "--json"])
        out, err = capfd.readouterr()
        assert status == 0, err
        return json.loads(out)

    run(f"compress --model {model} --plan 2-6-2 --out bundle")
    distilled = run(
        f"distill --model {model} --bundle bundle --data public.txt --out emulator "
        f"--num-workers 0 --learning-rate 1e-3 {TRAIN}"
    )
    assert distilled["last_losses"]["hidden"] < 0.9 * distilled["first_losses"]["hidden"]
    tuned = run(
        f"finetune --bundle emulator --data private.txt --out adapter --learning-rate 5e-4 {TRAIN}"
    )
    assert tuned["last_loss"] < tuned["first_loss"] - 0.05
    # As a stand-in for full fine-tuning, the directory shows that memory and disk are one model.
    run(f"plug-in --model {model} --adapter adapter --out plugged-in")
    result = run(
        f"evaluate --model {model} --bundle emulator --adapter adapter --finetuned plugged-in "
        f"--task-data {arc} {MEASURE}"
    )
    settings = result["settings"]
    nats = {name: measured["nats_per_token"] for name, measured in settings.items() if measured}
    # Measured: 0.34 and 0.55.
    assert nats["plug_in"] < nats["full_zero_shot"] - 0.1
    assert nats["emulator_fine_tuned"] < nats["emulator_zero_shot"] - 0.15
    assert settings["plug_in"] == settings["full_fine_tuned"]
    assert result["gaps"]["utility"] == 0
    assert result["gaps"]["privacy"] == nats["emulator_fine_tuned"] - nats["plug_in"]
    arc_easy = settings["plug_in"]["tasks"]["arc_easy"]
    assert arc_easy["num_documents"] == 24
    assert 0 <= arc_easy["acc"] <= 1
