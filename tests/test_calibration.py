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
from offsite_ray.calibration.text import as_trained, batches_of
from offsite_ray.config import CompressConfig, EvaluateConfig
from offsite_ray.data import write_blocks
from offsite_ray.emulator import compress, open_bundle
from offsite_ray.errors import ConfigError, DataError, FamilyError, PlugInError
from offsite_ray.evaluation import evaluate
from offsite_ray.full_model import open_full_model
from offsite_ray.selection import SELECTION_METHODS
from tests.adapters import make_adapter
from tests.calibrations import (
    NOT_APART,
    SIX,
    batches,
    documents,
    mean_loss,
    packed,
    read_blocks,
    tokens_of,
)
from tests.stock import blocks_in, put_blocks, stock
from tests.texts import write_rows
from tests.tiny_models import END_OF_TEXT, FAMILIES, NUM_BLOCKS, save_tiny, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.loops import Loop

CALIBRATED = [
    name for name, row in SELECTION_METHODS.items() if row.needs_text and not row.replaces
]


def stock_states(model: Any, tokens: Tensor) -> list[Tensor]:
    """Return the hidden states before each block and behind the last, by hooks."""
    found: list[Tensor] = []

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    def behind(_module: Any, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    blocks = blocks_in(model)
    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(behind))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


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


@pytest.mark.parametrize("family", SIX)
def test_documents_in_a_row_do_not_see_each_other(tmp_path: Path, family: str) -> None:
    full = open_full_model(save_tiny(family, tmp_path / "model"))
    given = batches_of(as_trained(packed(tokens_of()), full))
    assert ("position_ids" in given[0]) is (family not in NOT_APART)
    whole: Any = stock(full.path)
    assert PartialLoss(full, given)([]) == pytest.approx(mean_loss(whole, given), rel=1e-5)
    seen: list[Tensor] = []
    blockwise_forward(full, given, lambda _index, _before, after: seen.append(after))
    alone = [stock_states(whole, tokens)[-1] for batch in given for tokens, _ in documents(batch)]
    expected = torch.cat([states[0] for states in alone])
    torch.testing.assert_close(seen[-1].flatten(0, 1), expected, rtol=1e-4, atol=1e-5)


def test_what_a_row_must_be_to_be_drawn(loop: Loop, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a" * 40, "completion": "b"},  # fills a row and predicts nothing
        {"text": "c" * 14},  # fifteen with its end: the next begins at the end of the row
        {"text": "d" * 10},
        {"prompt": "e", "completion": "f" * 12},  # no room for it: the row before it is padded
        {"prompt": "h", "completion": "i" * 10},  # and so is that of the one before this
        {"text": "j" * 12},
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    write_blocks([str(tmp_path / "rows.jsonl")], loop.model, 16, tmp_path / "data")
    given = config(loop.model, tmp_path / "out", tmp_path / "data", calibration_seq_len=None)
    drawn = calibrate(open_full_model(loop.model), given, None)
    texts = sorted(tiny_tokenizer().decode(row["input_ids"].tolist()) for row in drawn._rows)
    end = END_OF_TEXT
    assert texts == [f"{'c' * 14}{end}d", f"h{'i' * 10}{end}jjjj"]


def test_a_text_of_one_document_is_read_as_ever(loop: Loop, tmp_path: Path) -> None:
    given = config(loop.model, tmp_path / "out", loop.text)
    drawn = calibrate(open_full_model(loop.model), given, None)
    for batch in drawn._batches:
        assert set(batch) == {"input_ids", "labels"}
        assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])


@pytest.mark.parametrize("family", SIX)
def test_the_loss_without_some_blocks(tmp_path: Path, family: str) -> None:
    model = save_tiny(family, tmp_path / "model")
    tokens = tokens_of(5, 12)
    loss = PartialLoss(open_full_model(model), batches(tokens))
    whole: Any = stock(model)
    with torch.no_grad():
        expected = whole(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert loss([]) == pytest.approx(float(expected), rel=1e-5)
    # What the others compute does not hang on what is left out: a block that changes nothing
    # is as good as none.
    states = stock_states(whole, tokens)
    blocks = list(blocks_in(whole))
    assert len(states) == len(blocks) + 1
    dropped = [2, 4]
    for index in dropped:
        blocks[index].forward = _unchanged(family)
    put_blocks(whole, torch.nn.ModuleList(blocks))
    with torch.no_grad():
        expected = whole(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert loss(dropped) == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_goes_on_from_the_block_that_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, given = open_full_model(save_tiny("llama", tmp_path / "model")), batches(tokens_of())
    monkeypatch.setattr("offsite_ray.calibration.losses._HELD_BYTES", 0)
    blocks = read_blocks(monkeypatch)
    loss = PartialLoss(full, given)
    for dropped, expected in [
        ([], [0, 1, 2, 3, 4, 5]),
        ([1], [0, 2, 3, 4, 5]),
        ([2], [1, 3, 4, 5]),
        ([4], [2, 3, 5]),
        ([2, 1], [0, 3, 4, 5]),  # block 2 was not dropped below block 4
        ([2, 3], [1, 4, 5]),
        ([2, 5], [3, 4]),
        ([], [0, 1, 2, 3, 4, 5]),
    ]:
        del blocks[:]
        found = loss(dropped)
        assert blocks == expected
        assert found == PartialLoss(full, given)(dropped)


def test_a_model_that_is_small_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = read_blocks(monkeypatch, most=5)
    loss = PartialLoss(open_full_model(save_tiny("gpt2", tmp_path / "model")), batches(tokens_of()))
    losses = [loss(dropped) for dropped in ([], [1], [2], [])]
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3
    assert blocks == [0, 1, 2, 3, 4, 5]


def _unchanged(family: str) -> Any:
    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, None) if family == "bloom" else hidden_states

    return forward


def config(model: Path, out: Path, text: Path, **given: Any) -> CompressConfig:
    return CompressConfig(
        model=str(model),
        out=str(out),
        calibration=(str(text),),
        **{"plan": "1-2-1", "calibration_sequences": 6, "calibration_seq_len": 16, **given},
    )


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


def test_greedy_drops_the_block_without_which_the_model_is_best(loop: Loop, tmp_path: Path) -> None:
    made = compress(
        config(loop.model, tmp_path / "bundle", loop.text, plan="1-3-1", select="greedy")
    )
    full = open_full_model(loop.model)
    given = config(loop.model, tmp_path / "none", loop.text, plan="1-3-1", select="greedy")
    loss = PartialLoss(full, calibrate(full, given, None)._batches)
    losses = {block: loss([block]) for block in range(1, 5)}
    best = min(losses, key=lambda block: losses[block])
    assert made.emulator == tuple(block for block in range(1, 5) if block != best)


def test_greedy_evaluates_each_set_of_blocks_once(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls: list[tuple[int, ...]] = []
    evaluate_once = PartialLoss.__call__

    def counted(self: PartialLoss, dropped: Any) -> float:
        calls.append(tuple(sorted(dropped)))
        return evaluate_once(self, dropped)

    monkeypatch.setattr(PartialLoss, "__call__", counted)

    def made(name: str, plan: str) -> tuple[int, ...]:
        given = config(loop.model, tmp_path / name, loop.text, plan=plan, select="greedy")
        return compress(given).emulator

    kept = made("two", "1-2-1")
    assert sorted(map(len, calls)) == [1] * 4 + [2] * 3
    assert len(set(calls)) == 7
    del calls[:]
    assert made("again", "1-2-1") == kept
    assert set(kept) < set(made("three", "1-3-1"))
    assert calls == [], "a smaller drop is the beginning of a larger one"
    assert set(made("one", "1-1-1")) < set(kept)
    assert [len(dropped) for dropped in calls] == [3, 3], "a larger one goes on from it"
    (file,) = (tmp_path / "cache" / "offsite_ray" / "calibration").glob("*-losses.json")
    file.write_text("{")
    assert made("damaged", "1-2-1") == kept


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
