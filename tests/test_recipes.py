# SPDX-License-Identifier: Apache-2.0
"""The recipes for real models: each holds for the real shape; the job runs one to its end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import transformers

from offsite_ray.architectures import empty_model, load_config, resolve_architecture
from offsite_ray.cli.arguments import parse
from offsite_ray.cli.verbs import VERBS
from offsite_ray.emulator import open_bundle
from offsite_ray.selection import selection_method
from offsite_ray.split import parse_plan
from offsite_ray.training.sources import row_length
from tests.conftest import ROOT
from tests.stores import SECRET, Store

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loops import Loop

RECIPES = ROOT / "jobs" / "recipes"

SHAPES: dict[str, tuple[Any, float]] = {
    "gpt2-xl": (transformers.GPT2Config(n_embd=1600, n_layer=48, n_head=25), 1.558e9),
    "opt-1.3b": (
        transformers.OPTConfig(
            hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32
        ),
        1.316e9,
    ),
    "opt-6.7b": (
        transformers.OPTConfig(
            hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32
        ),
        6.658e9,
    ),
    "bloom-7b1": (
        transformers.BloomConfig(hidden_size=4096, n_layer=30, n_head=32, vocab_size=250_880),
        7.069e9,
    ),
    "llama-3.1-8b": (
        transformers.LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128_256,
            max_position_embeddings=131_072,
        ),
        8.030e9,
    ),
    "qwen3-8b": (
        transformers.Qwen3Config(
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151_936,
            max_position_embeddings=32_768,
        ),
        8.191e9,
    ),
}
"""Recipe to the model's own configuration, and its parameters as its owner counts them."""


def words_of(verb: str, recipe: str, *changes: str) -> Any:
    words = ["--config", str(RECIPES / f"{recipe}.yaml"), *changes]
    return parse(VERBS[verb], words, VERBS).config


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(SHAPES)


@pytest.mark.parametrize("recipe", SHAPES)
def test_a_recipe_holds_for_the_real_shape(recipe: str, tmp_path: Path) -> None:
    config, num_parameters = SHAPES[recipe]
    config.save_pretrained(tmp_path)
    loaded = load_config(tmp_path)
    arch = resolve_architecture(loaded)
    assert arch.recognised == "table"
    counted = sum(parameter.numel() for parameter in empty_model(loaded).parameters())
    assert counted == pytest.approx(num_parameters, rel=1e-3)
    compress, prepare, distill, finetune = (
        words_of(verb, recipe) for verb in ("compress", "prepare", "distill", "finetune")
    )
    choose = selection_method(compress.select).choose
    plan = parse_plan(compress.plan, arch.num_blocks, lambda m, n: choose(m, n, None))
    assert plan.emulator
    assert not plan.keeps_every_block
    assert row_length(loaded, prepare.block_size, None) == prepare.block_size
    assert compress.model == distill.model
    assert compress.out == distill.bundle == prepare.tokenizer
    assert (prepare.out,) == distill.data
    assert distill.out == finetune.bundle
    assert distill.batch_size % (distill.num_workers * distill.micro_batch_size) == 0
    assert distill.warmup_fraction * distill.max_steps == 2000
    assert distill.resume
    asked = words_of("estimate", recipe)
    assert (asked.model, asked.plan, asked.seq_len) == (
        compress.model,
        compress.plan,
        prepare.block_size,
    )
    assert asked.gpus == distill.num_workers
    for name in ("batch_size", "micro_batch_size", "zero_stage", "gradient_checkpointing"):
        assert getattr(asked, name) == getattr(distill, name)


def job(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "distill.py"), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.fixture
def words(loop: Loop, tmp_path: Path) -> list[str]:
    """Return what makes a recipe small: a tiny model, no cluster, few steps."""
    (tmp_path / "public").mkdir()
    (tmp_path / "public" / "text.txt").write_text(loop.text.read_text())
    changes = {
        "compress.model": loop.model,
        "compress.plan": "1-2-1",
        "prepare.block_size": 32,
        "prepare.num_workers": 0,
        "distill.model": loop.model,
        "distill.num_workers": 0,
        "distill.zero_stage": 0,
        "distill.batch_size": 4,
        "distill.micro_batch_size": 2,
        "distill.max_steps": 3,
    }
    overrides = [f"{key}={value}" for key, value in changes.items()]
    recipe = str(RECIPES / "opt-1.3b.yaml")
    return ["--root", str(tmp_path), "--config", recipe, *overrides]


def test_the_job_goes_from_a_model_to_a_distilled_bundle(words: list[str], tmp_path: Path) -> None:
    done = job(*words)
    assert done.returncode == 0, done.stderr
    manifest = open_bundle(tmp_path / "opt-1.3b" / "emulator").manifest
    assert manifest.recipe["distillation"]["max_steps"] == 3
    assert (tmp_path / "opt-1.3b" / "logs" / "metrics.jsonl").is_file()
    shutil.rmtree(tmp_path / "opt-1.3b" / "public")
    again = job(*words)
    assert (again.returncode, again.stdout) == (0, ""), "the emulator is there: nothing is left"


def test_a_folder_that_is_not_there_is_one_line(words: list[str], tmp_path: Path) -> None:
    refused = job("--root", str(tmp_path / "nowhere"), *words[2:])
    assert refused.returncode == 2
    assert "No such file or directory" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_job_does_what_is_left(words: list[str], tmp_path: Path) -> None:
    failed = job(*words, "distill.learning_rate=-1")
    assert failed.returncode == 2
    assert "learning_rate=-1" in failed.stderr
    assert not (tmp_path / "opt-1.3b" / "emulator").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "opt-1.3b").rglob("*")}
    done = job(*words)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before if path.is_file()} == {
        path: changed for path, changed in before.items() if path.is_file()
    }


def test_the_job_sees_what_is_in_a_store(words: list[str]) -> None:
    with Store() as store:
        store.write("emulator/offsite.json", b"{}")
        done = job(*words, f"distill.out={store.uri('emulator')}")
    assert done.returncode == 0, done.stderr
    assert "distill: s3://bucket/emulator is there already, skipped\n" in done.stderr
    assert SECRET not in done.stderr


def test_an_override_of_no_step_is_refused(words: list[str]) -> None:
    refused = job(*words, "max_steps=3")
    assert refused.returncode == 2
    assert "'max_steps=3' begins with none of compress., prepare., distill." in refused.stderr
    assert "Traceback" not in refused.stderr
