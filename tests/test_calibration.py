# SPDX-License-Identifier: Apache-2.0
"""Calibration: the same hidden states and losses as stock transformers, and bundles by them."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from offsite_ray.calibration import BlockSignals, block_signals, blockwise_forward, calibrate
from offsite_ray.calibration.losses import PartialLoss
from offsite_ray.config import CompressConfig, EvaluateConfig
from offsite_ray.data import write_blocks
from offsite_ray.emulator import compress, open_bundle
from offsite_ray.errors import ConfigError, DataError, FamilyError, PlugInError
from offsite_ray.evaluation import evaluate
from offsite_ray.full_model import open_full_model
from offsite_ray.selection import SELECTION_METHODS
from tests.adapters import make_adapter
from tests.calibrations import SIX, batches, config, mean_loss, stock_states, tokens_of
from tests.stock import blocks_in, stock
from tests.tiny_models import FAMILIES, NUM_BLOCKS, save_tiny

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.loops import Loop

CALIBRATED = [
    name for name, row in SELECTION_METHODS.items() if row.needs_text and not row.replaces
]


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_is_the_model(tmp_path: Path, family: str) -> None:
    model = save_tiny(family, tmp_path / "model", max_shard_size=20_000)
    tokens = tokens_of(5, 12)
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def see(index: int, before: Tensor, after: Tensor) -> None:
        seen.setdefault(index, []).append((before, after))

    full, given = open_full_model(model), batches(tokens)
    blockwise_forward(full, given, see)
    assert list(seen) == list(range(NUM_BLOCKS))
    states = stock_states(stock(model), tokens)
    for index, pairs in seen.items():
        before, after = (torch.cat(each) for each in zip(*pairs, strict=True))
        torch.testing.assert_close(before, states[index], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(after, states[index + 1], rtol=1e-5, atol=1e-6)
    assert PartialLoss(full, given)([]) == pytest.approx(mean_loss(stock(model), given), rel=1e-5)


def test_the_signals_are_what_they_are_said_to_be(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    tokens = tokens_of(5, 12)
    found = block_signals(open_full_model(model), batches(tokens))
    states = stock_states(stock(model), tokens)
    for block in range(NUM_BLOCKS):
        cosine = F.cosine_similarity(states[block], states[block + 1], dim=-1)
        assert found.influence(block) == pytest.approx(1 - float(cosine.mean()), abs=1e-6)
    a, b = states[1][:, -1], states[4][:, -1]
    angle = F.cosine_similarity(a, b, dim=-1).arccos().mean() / math.pi
    assert found.distance(1, 3) == pytest.approx(float(angle), abs=1e-5)
    weights = torch.arange(1, 13).float()[None, :, None] / 78
    x, y = ((states[i + 1] * weights).sum(1).double() for i in (2, 4))
    x, y = x - x.mean(0), y - y.mean(0)
    cka = (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    assert found.alignment(2, 4) == pytest.approx(float(cka), abs=1e-5)
    assert found.alignment(3, 3) == pytest.approx(1)


def test_signals_by_hand() -> None:
    states = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 2.0]]])
    found = BlockSignals(similarity=torch.tensor([0.5, 0.25]), last=states, pooled=states)
    assert [found.influence(0), found.influence(1)] == [0.5, 0.75]
    assert found.distance(0, 1) == pytest.approx(0.25)
    assert found.distance(0, 2) == pytest.approx(0.5)
    assert found.alignment(0, 1) == 0.0, "one sequence varies in nothing"


@pytest.mark.parametrize(("family", "method"), list(itertools.product(SIX, CALIBRATED)))
def test_every_method_makes_a_bundle_of_every_family(
    loop: Loop, tmp_path: Path, family: str, method: str
) -> None:
    model = save_tiny(family, tmp_path / "model")
    out = tmp_path / "bundle"
    compress(config(model, out, loop.text, select=method, plan="1-3-1"))
    bundle = open_bundle(out)
    recipe = bundle.manifest.recipe["selection"]
    assert recipe["calibration"]["num_sequences"] == 6
    assert recipe["calibration"]["seq_len"] == 16
    emulator: Any = stock(out)
    kept = recipe.get("copies_of", list(bundle.plan.kept))
    assert (len(kept) == NUM_BLOCKS) is (method == "cka_cluster_shared")
    full = blocks_in(stock(model))
    for position, index in enumerate(kept):
        own = blocks_in(emulator)[position].state_dict()
        for name, tensor in full[index].state_dict().items():
            assert torch.equal(own[name], tensor)
    with torch.no_grad():
        plain = emulator(input_ids=tokens_of(), use_cache=False).logits
    generated = emulator.generate(tokens_of(1), max_new_tokens=4, do_sample=False, use_cache=True)
    again = emulator.generate(tokens_of(1), max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(generated, again), "each copy has a cache of its own"
    assert bool(torch.isfinite(plain).all())


def test_the_same_seed_and_text_choose_the_same_and_the_cache_is_used(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = {"select": "block_influence"}
    first = compress(config(loop.model, tmp_path / "a", loop.text, **given))
    (cached,) = (tmp_path / "cache" / "offsite_ray" / "calibration").glob("[!.]*")
    monkeypatch.setattr("offsite_ray.calibration.run.block_signals", None)
    again = compress(config(loop.model, tmp_path / "b", loop.text, **given))
    assert again.emulator == first.emulator
    other = save_tiny("gpt2", tmp_path / "other", seed=5)
    full = open_full_model(other)
    with pytest.raises(TypeError):
        calibrate(full, config(other, tmp_path / "c", loop.text), None).influence(0)
    assert list(cached.parent.glob("[!.]*")) == [cached]


def test_what_is_missing_is_said(loop: Loop, tmp_path: Path) -> None:
    for plan, fine in (("1-2-1", False), ("adapter=0,5 emulator=2", True)):
        given = CompressConfig(
            model=str(loop.model), plan=plan, out=str(tmp_path / plan[0]), select="angular"
        )
        if fine:
            compress(given)
            continue
        with pytest.raises(ConfigError, match="give some with --calibration FILE"):
            compress(given)
    chat = tmp_path / "pairs.jsonl"
    row = json.dumps({"prompt": "a b", "completion": " c"})
    chat.write_text(f"{row}\n" * 9)
    write_blocks([str(chat)], loop.model, 16, tmp_path / "pairs")
    with pytest.raises(DataError, match="no row that text fills to its end"):
        compress(
            config(
                loop.model,
                tmp_path / "bundle",
                tmp_path / "pairs",
                select="greedy",
                calibration_seq_len=None,
            )
        )


@pytest.mark.parametrize(
    ("computes", "ask"),
    [
        ("run.block_signals", lambda found: found.influence(0)),
        ("run.PartialLoss", lambda found: found.loss([2])),
        ("run.learn_replacement", lambda found: found.scores([1, 2, 3], 2)),
        ("moments.blockwise_forward", lambda found: len(found.statistics("inputs", [1])._found)),
    ],
)
def test_of_many_who_ask_at_once_one_computes(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computes: str, ask: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    full = open_full_model(loop.model)
    given = config(loop.model, tmp_path / "none", loop.text, harmonizer_steps=2)
    asking = [calibrate(full, given, None) for _ in range(3)]
    module, name = computes.split(".")
    own = importlib.import_module(f"offsite_ray.calibration.{module}")
    compute, times = getattr(own, name), []
    start = threading.Barrier(len(asking))

    def counted(*args: Any, **kwargs: Any) -> Any:
        times.append(1)
        time.sleep(0.2)  # the others are there by now, and would compute as well
        return compute(*args, **kwargs)

    def one(calibration: Any) -> Any:
        start.wait()
        return ask(calibration)

    monkeypatch.setattr(own, name, counted)
    with ThreadPoolExecutor(len(asking)) as pool:
        answers = list(pool.map(one, asking))
    assert answers == [answers[0]] * 3
    assert times == [1]


def test_what_the_plan_names_is_said_to_be_explicit(loop: Loop, tmp_path: Path) -> None:
    given = CompressConfig(
        model=str(loop.model), plan="adapter=0,5 emulator=2", out=str(tmp_path / "bundle")
    )
    assert compress(given).select == "explicit"
    recipe = open_bundle(tmp_path / "bundle").manifest.recipe
    assert recipe["selection"]["method"] == "explicit"


def test_what_cannot_be_kept_is_computed_all_the_same(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for select, method in (("angular", "none"), ("uniform", "low_rank_aware:0.5")):
        out = tmp_path / select
        compress(config(loop.model, out, loop.text, select=select, compress=method))
        assert open_bundle(out).manifest.recipe["compression"]


def test_a_bundle_of_copies_is_no_bound(loop: Loop, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    made = compress(config(loop.model, out, loop.text, select="cka_cluster_shared"))
    assert made.plan == "1-4-1"
    manifest = open_bundle(out).manifest
    assert manifest.plan.keeps_every_block
    assert len(set(manifest.recipe["selection"]["copies_of"])) == 4
    make_adapter(out, tmp_path / "adapter")
    with pytest.raises(PlugInError, match="not every block as it is, so it is no bound"):
        evaluate(
            EvaluateConfig(
                model=str(loop.model), bound=str(tmp_path / "adapter"), text=(str(loop.text),)
            )
        )


def test_blocks_that_need_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = open_full_model(save_tiny("llama", tmp_path / "model"))
    monkeypatch.setattr(full.config, "num_kv_shared_layers", 2, raising=False)
    with pytest.raises(FamilyError, match="shares keys and values between blocks"):
        blockwise_forward(full, batches(tokens_of()), lambda *_: None)
