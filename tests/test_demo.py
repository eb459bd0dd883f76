# SPDX-License-Identifier: Apache-2.0
"""The demo at a reduced size, and what it is made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offsite_ray.bundle import read_manifest
from offsite_ray.config import DemoConfig
from offsite_ray.demo.recipe import DemoRecipe
from offsite_ray.demo.run import run_demo
from offsite_ray.demo.task import write_task
from offsite_ray.demo.texts import Document, held_out, package_documentation, standard_library
from offsite_ray.errors import DataError, StorageError
from offsite_ray.results import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
FOUNDATION = ROOT / "examples" / "foundation"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_demo_runs_the_whole_loop(tmp_path: Path) -> None:
    told: list[str] = []
    out = tmp_path / "demo"
    result = run_demo(DemoConfig(out=str(out), scale=0.01), told.append)
    assert [line[:3] for line in told if line[:1].isdigit()] == [f"{i}/6" for i in range(1, 7)]
    assert f"wrote {out / 'report.html'} and report.png" in told[-1]
    settings = result.evaluation.settings
    for name in SETTINGS:
        measured = settings[name]
        assert measured is not None
        assert measured.perplexity is not None
        assert 0 <= measured.tasks["continuation"]["acc"] <= 1
    assert result.evaluation.bound_share is not None
    assert sorted(p.name for p in (out / "data-owner").iterdir()) == [
        "adapter",
        "bundle",
        "private.jsonl",
    ]
    distilled = read_manifest(out / "data-owner" / "bundle")
    assert distilled.recipe["distillation"]["zero_stage"] == 3
    assert distilled.recipe["distillation"]["num_workers"] == 2
    adapter = read_manifest(out / "data-owner" / "adapter")
    assert adapter.trained_against == distilled.id
    page = Path(result.report).read_text(encoding="utf-8")
    assert "http" not in page.replace("http://www.w3.org", "")
    for text in ("Plug-in", "The trade", "distillation", "adapter bundle"):
        assert text in page
    assert Path(result.picture).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(StorageError, match="not empty"):
        run_demo(DemoConfig(out=str(out)), told.append)


def test_the_foundation_is_as_it_is_said() -> None:
    config = json.loads((FOUNDATION / "config.json").read_text())
    record = json.loads((FOUNDATION / "training.json").read_text())
    assert config["num_hidden_layers"] >= 12
    assert (FOUNDATION / "model.safetensors").stat().st_size <= 8_000_000
    held = record["held_out"]
    assert held["perplexity"] < held["unigram_perplexity"] / 20


@pytest.mark.slow
def test_the_foundation_has_the_perplexity_of_its_record() -> None:
    from offsite_ray.architectures import load_model, load_tokenizer
    from offsite_ray.evaluation.perplexity import encode, perplexity

    _, test = held_out(standard_library(), one_in=32)
    model, tokenizer = load_model(FOUNDATION), load_tokenizer(FOUNDATION)
    texts = [document.text[:4000] for document in test[:12]]
    measured = perplexity(model, encode(tokenizer, texts), seq_len=256, batch_size=8)
    # A sample of the held-out text, and another Python's text differs a little.
    assert measured.perplexity < 25


def test_private_text_is_held_out_by_name() -> None:
    documents = package_documentation(DemoRecipe().private_package)
    train, test = held_out(documents, 6)
    assert len(train) + len(test) == len(documents)
    assert len(test) > 10
    assert not {d.name for d in train} & {d.name for d in test}
    assert sum(len(d.text) for d in train) > 500_000


def test_a_question_has_one_right_choice(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(900)]
    document = Document(name="d", text=" ".join(words))
    write_task(tmp_path, [document], 10, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "continuation.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    for row in rows:
        assert row["question"] + row["choices"][row["answer"]] in document.text
        assert len(set(row["choices"])) == 4
    assert len({row["answer"] for row in rows}) > 1
    with pytest.raises(DataError, match="passages"):
        write_task(tmp_path, [Document(name="d", text="short")], 10, seed=0)


def test_without_a_foundation_the_demo_says_what_to_do(tmp_path: Path) -> None:
    config = DemoConfig(out=str(tmp_path / "out"), foundation=str(tmp_path / "none"))
    with pytest.raises(StorageError, match="--foundation DIR"):
        run_demo(config, lambda _: None)
    assert list(tmp_path.iterdir()) == []
