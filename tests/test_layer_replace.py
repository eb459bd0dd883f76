# SPDX-License-Identifier: Apache-2.0
"""Learnt scores and harmonizers in the place of dropped blocks, on real tiny models."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from offsite_ray.architectures import harmonizer, in_full
from offsite_ray.calibration import replacement
from offsite_ray.calibration.replacement import (
    MixedModel,
    draw,
    learn_replacement,
    rewarded,
)
from offsite_ray.cli import main
from offsite_ray.config import DistillConfig, EvaluateConfig
from offsite_ray.distillation import distill
from offsite_ray.emulator import compress, open_bundle
from offsite_ray.errors import ConfigError, FamilyError, OffsiteError, PlanError, PlugInError
from offsite_ray.estimate.shapes import open_shapes
from offsite_ray.evaluation import evaluate
from offsite_ray.full_model import open_full_model
from offsite_ray.inspection import inspect_path
from offsite_ray.training import run_here
from tests.adapters import make_adapter
from tests.calibrations import SIX, batches, rows_of, tokens_of
from tests.harmonizers import HOW, MIDDLE, RANK, config, dead_parts, harmonized
from tests.loops import ignore
from tests.stock import blocks_in, logits_of, plug, put_blocks, same_bytes, stock, stored
from tests.tiny_models import NUM_BLOCKS, save_tiny, tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from tests.loops import Loop


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is learnt here apart from the user's cache, which an older code may have filled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=SIX)
def case(
    request: pytest.FixtureRequest, loop: Loop, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """Return a family, its tiny full model, and a bundle with two harmonizers."""
    root = tmp_path_factory.mktemp(request.param)
    model = save_tiny(request.param, root / "model")
    compress(config(model, root / "bundle", loop.text))
    return request.param, model, root / "bundle"


def test_a_score_by_hand() -> None:
    scores = {3: 0.0, 4: math.log(3), 7: -1.0}
    draws, losses = [[3, 4], [3]], [-math.log(0.5), -math.log(0.1)]
    # The gains are 0.5 and 0.1, their mean 0.3, the rewards 0.2 and -0.2.
    found = rewarded(scores, draws, losses)
    assert found[3] == pytest.approx(0.0), "kept in both"
    # sigmoid(log 3) = 3/4
    assert found[4] == pytest.approx(math.log(3) + 0.1 * 0.2 * 3 / 4 * 1 / 4)
    assert found[7] == -1.0, "kept in neither"
    assert rewarded(scores, [[3], [4], [7]], [2.0, 2.0, 2.0]) == scores


def test_a_high_score_is_kept_more_often() -> None:
    source = random.Random(0)
    draws = [draw({2: 0.0, 3: 3.0, 5: -3.0, 6: 0.0}, 2, source) for _ in range(400)]
    assert all(kept == sorted(set(kept)) and len(kept) == 2 for kept in draws)
    often = {block: sum(block in kept for kept in draws) for block in (2, 3, 5, 6)}
    assert often[3] > often[2] > often[5]
    assert len({tuple(kept) for kept in draws}) > 3, "each is a draw of its own"


@pytest.mark.parametrize("family", SIX)
def test_a_fresh_harmonizer_changes_nothing_and_a_trained_one_fits(
    tmp_path: Path, family: str
) -> None:
    model = save_tiny(family, tmp_path / "model")
    mixed = MixedModel(open_full_model(model), MIDDLE, HOW)
    (batch,) = batches(tokens_of(), 6)
    whole: Any = stock(model)
    with torch.no_grad():
        expected = whole(input_ids=tokens_of(), labels=tokens_of(), use_cache=False).loss
    assert mixed.loss(batch, MIDDLE) == pytest.approx(float(expected), rel=1e-5)
    ends = nn.ModuleList([blocks_in(whole)[0], blocks_in(whole)[2], blocks_in(whole)[5]])
    put_blocks(whole, ends)
    whole.config.num_hidden_layers = 3
    if getattr(whole.config, "layer_types", None):
        whole.config.layer_types = [whole.config.layer_types[i] for i in (0, 2, 5)]
    with torch.no_grad():
        expected = whole(input_ids=tokens_of(), labels=tokens_of(), use_cache=False).loss
    before = mixed.loss(batch, [2])
    assert before == pytest.approx(float(expected), rel=1e-5)
    for _ in range(20):
        mixed.train(batch, [2])
    assert mixed.loss(batch, [2]) < before - 0.02
    assert sorted(mixed.parameters_beside([2])) == [1, 3, 4]


def test_a_harmonizer_by_hand() -> None:
    block = blocks_in(tiny_model("llama"))[0]
    own: Any = harmonizer(block, 2)
    with torch.no_grad():
        own.mlp.down_proj.weight.copy_(torch.randn(32, 2))
        own.input_layernorm.weight.fill_(3.0)
    hidden = torch.randn(1, 3, 32)
    embeddings = (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    with torch.no_grad():
        found = own(hidden, position_embeddings=embeddings)
        normed = hidden * (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        normed = normed * block.get_parameter("post_attention_layernorm.weight")
        gate, up, down = (getattr(own.mlp, f"{n}_proj").weight for n in ("gate", "up", "down"))
        inner = nn.functional.silu(normed @ gate.T) * (normed @ up.T)
    torch.testing.assert_close(found, hidden + inner @ down.T)
    padded = in_full(torch.ones(1, 2), (2, 3))
    assert padded.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert in_full(torch.empty(0, 0), (1, 2)).tolist() == [[0, 0]]


def test_the_bundle_computes_what_was_trained(
    loop: Loop, case: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, bundle = case
    opened = open_bundle(bundle)
    assert opened.plan.keeps_every_block
    replaced = harmonized(bundle)
    assert len(replaced) == 2
    emulator, full = stock(bundle), stock(model)
    for index, (own, block) in enumerate(zip(blocks_in(emulator), blocks_in(full), strict=True)):
        same = same_bytes(dict(own.state_dict()), dict(block.state_dict()))
        assert same is (index not in replaced)
        if index in replaced:
            assert all(not bool(part.any()) for part in dead_parts(own).values())
    # The emulator is the mixture in memory.
    seen: list[Tensor] = []
    whole = MixedModel.parameters_beside

    def see(mixed: MixedModel, kept: Any) -> Any:
        for index, slot in mixed._slots.items():
            slot.replaced = index not in kept
        seen.append(logits_of(mixed._model))
        return whole(mixed, kept)

    monkeypatch.setattr(MixedModel, "parameters_beside", see)
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundle.parent / "no-cache"))
    again = bundle.parent / "again"
    compress(config(model, again, loop.text))
    torch.testing.assert_close(logits_of(emulator), seen[0], rtol=1e-5, atol=1e-5)
    assert same_bytes(stored(again), stored(bundle)), "the same request, the same bytes"
    tokens = tokens_of(1)
    generate: Any = emulator.generate
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        generate(tokens, use_cache=True, **kwargs), generate(tokens, use_cache=False, **kwargs)
    )


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_adapter_plugs_in(tmp_path: Path, case: tuple[str, Path, Path], method: str) -> None:
    _, model, bundle = case
    make_adapter(bundle, tmp_path / "fresh", method=method)
    plug(model, tmp_path / "fresh", tmp_path / "plugged")
    assert same_bytes(stored(tmp_path / "plugged"), stored(model))


def test_a_trained_adapter_changes_only_its_blocks(
    tmp_path: Path, case: tuple[str, Path, Path]
) -> None:
    _, model, bundle = case
    make_adapter(bundle, tmp_path / "adapter", noise=0.1)
    plug(model, tmp_path / "adapter", tmp_path / "plugged")
    full, plugged = stock(model), stock(tmp_path / "plugged")
    for index in range(NUM_BLOCKS):
        old, new = (dict(blocks_in(each)[index].state_dict()) for each in (full, plugged))
        assert same_bytes(new, old) is (index not in (0, NUM_BLOCKS - 1))


def test_distilling_leaves_a_harmonizer_of_its_rank(
    loop: Loop, tmp_path: Path, case: tuple[str, Path, Path]
) -> None:
    _, model, bundle = case
    distill(
        DistillConfig(
            model=str(model),
            bundle=str(bundle),
            out=str(tmp_path / "distilled"),
            data=(str(loop.text),),
            seq_len=16,
            batch_size=2,
            max_steps=3,
            learning_rate=1e-2,
            num_workers=0,
        ),
        run_here,
        ignore,
    )
    before, after = stock(bundle), stock(tmp_path / "distilled")
    for index in harmonized(bundle):
        own, old = blocks_in(after)[index], blocks_in(before)[index]
        assert not same_bytes(dict(own.state_dict()), dict(old.state_dict()))
        for path, part in dead_parts(own).items():
            assert not bool(part.any()), path


@pytest.mark.parametrize("text", ["quantize:8", "low_rank:0.5", "low_rank_aware:0.5"])
def test_compression_leaves_harmonizers_alone(
    loop: Loop, tmp_path: Path, case: tuple[str, Path, Path], text: str
) -> None:
    _, model, bundle = case
    compress(config(model, tmp_path / "small", loop.text, compress=text))
    plain, small = stored(bundle), stored(tmp_path / "small")
    replaced = harmonized(bundle)
    assert harmonized(tmp_path / "small") == replaced
    arch = open_bundle(bundle).arch
    for name, tensor in plain.items():
        if arch.block_of(name) in replaced:
            assert same_bytes({name: small[name]}, {name: tensor})
    kept = [n for n in plain if arch.block_of(n) in set(MIDDLE) - set(replaced)]
    assert any(n not in small or not torch.equal(small[n], plain[n]) for n in kept)


def test_what_was_learnt_is_kept_by_request(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compress(config(loop.model, tmp_path / "a", loop.text))
    monkeypatch.setattr("offsite_ray.calibration.run.learn_replacement", None)
    compress(config(loop.model, tmp_path / "b", loop.text))
    assert same_bytes(stored(tmp_path / "a"), stored(tmp_path / "b"))
    recipes = [inspect_path(tmp_path / name)["recipe"] for name in ("a", "b")]
    assert recipes[0] == recipes[1]
    for other in ({"seed": 1}, {"harmonizer_rank": 3}, {"harmonizer_steps": 5}, {"plan": "1-1-1"}):
        with pytest.raises(TypeError):
            compress(config(loop.model, tmp_path / "c", loop.text, **other))


def test_without_a_cache_it_is_learnt_once(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    times: list[int] = []

    def counted(*given: Any) -> Any:
        times.append(1)
        return learn_replacement(*given)

    monkeypatch.setattr("offsite_ray.calibration.run.learn_replacement", counted)
    assert compress(config(loop.model, tmp_path / "bundle", loop.text)).harmonizers
    assert times == [1]


def test_other_seeds_learn_other_things(tmp_path: Path) -> None:
    full = open_full_model(save_tiny("gpt2", tmp_path / "model"))
    learnt = [
        learn_replacement(
            full, rows_of(tokens_of(8)), MIDDLE, 2, dataclasses.replace(HOW, seed=seed)
        )
        for seed in (0, 0, 1)
    ]
    assert learnt[0].scores == learnt[1].scores != learnt[2].scores
    assert all(score != 0 for score in learnt[0].scores.values())
    assert list(learnt[0].harmonizers) == list(learnt[1].harmonizers)
    for index, parameters in learnt[0].harmonizers.items():
        assert same_bytes(dict(parameters), dict(learnt[1].harmonizers[index]))
    scores = learnt[0].scores
    dropped = sorted(scores, key=lambda block: scores[block])[:2]
    assert sorted(dropped) == sorted(learnt[0].harmonizers)


@pytest.mark.parametrize(("plan", "count"), [("1-0-1", 4), ("1-4-1", 0), ("spread=2 keep=1", 3)])
def test_none_and_all_and_other_places(loop: Loop, tmp_path: Path, plan: str, count: int) -> None:
    made = compress(config(loop.model, tmp_path / "bundle", loop.text, plan=plan))
    assert len(made.harmonizers) == count
    assert len(made.emulator) == 4
    logits = logits_of(stock(tmp_path / "bundle"))
    assert torch.equal(logits, logits_of(stock(loop.model))) is (count == 0)


def test_inspect_says_where_they_are(
    loop: Loop, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    made = compress(config(loop.model, out, loop.text))
    assert main(["inspect", str(out), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)["recipe"]["selection"]
    how = said["harmonizers"]
    assert how["blocks"] == list(made.harmonizers)
    assert (how["rank"], how["steps"]) == (RANK, 6)
    assert list(how["scores"]) == [str(index) for index in MIDDLE]
    assert said["calibration"]["data"]
    assert main(["inspect", str(out)]) == 0
    assert "harmonizers" in capfd.readouterr().out


def test_an_estimate_counts_harmonizers_as_blocks(loop: Loop) -> None:
    assert open_shapes(loop.model, "1-2-1", select="layer_replace").plan.keeps_every_block


def test_a_bundle_with_harmonizers_is_no_bound(loop: Loop, tmp_path: Path) -> None:
    compress(config(loop.model, tmp_path / "bundle", loop.text))
    make_adapter(tmp_path / "bundle", tmp_path / "adapter")
    with pytest.raises(PlugInError, match="not every block as it is, so it is no bound"):
        evaluate(
            EvaluateConfig(
                model=str(loop.model), bound=str(tmp_path / "adapter"), text=(str(loop.text),)
            )
        )


@pytest.mark.parametrize(
    ("family", "overrides", "given", "error", "match"),
    [
        ("mixtral", {}, {}, FamilyError, "MixtralDecoderLayer has no inner channels of its own"),
        ("phi3", {}, {}, FamilyError, "select by another method"),
        ("opt", {"do_layer_norm_before": False}, {}, FamilyError, "its norms are behind them"),
        ("gpt2", {}, {"harmonizer_rank": 999}, ConfigError, "more than the [0-9]+ inner channels"),
        ("gpt2", {}, {"plan": "adapter=0,5 emulator=2"}, PlanError, "learns which blocks to keep"),
        ("gpt2", {}, {"calibration": ()}, ConfigError, "give some with --calibration FILE"),
    ],
)
def test_what_cannot_be_is_refused(
    loop: Loop,
    tmp_path: Path,
    family: str,
    overrides: dict[str, Any],
    given: dict[str, Any],
    error: type[OffsiteError],
    match: str,
) -> None:
    model = save_tiny(family, tmp_path / "model", **overrides)
    with pytest.raises(error, match=match):
        compress(dataclasses.replace(config(model, tmp_path / "out", loop.text), **given))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["harmonizer_rank", "harmonizer_steps"])
def test_counts_begin_at_one(loop: Loop, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0 must be at least 1"):
        config(loop.model, tmp_path / "out", loop.text, **{name: 0})


@pytest.mark.parametrize(("count", "steps"), [(1, 1), (1, 3), (3, 2)])
def test_a_little_text_and_few_steps_will_do(tmp_path: Path, count: int, steps: int) -> None:
    full = open_full_model(save_tiny("gpt2", tmp_path / "model"))
    how = dataclasses.replace(HOW, steps=steps)
    learnt = replacement.learn_replacement(full, rows_of(tokens_of(count)), MIDDLE, 2, how)
    assert len(learnt.harmonizers) == 2


@pytest.mark.slow
def test_harmonizers_know_a_real_models_text(
    real_data: Path, real_model: Path, tmp_path: Path
) -> None:
    model, prose = real_model, real_data / "data/wikitext2"
    (tmp_path / "held-out.txt").write_text((prose / "test.txt").read_text()[:12_000])
    given = {"calibration_seq_len": 128, "harmonizer_rank": 16, "harmonizer_steps": 40}
    learnt = config(model, tmp_path / "learnt", prose / "valid.txt", plan="2-4-2", **given)
    compress(dataclasses.replace(learnt, calibration_sequences=128))
    plain = dataclasses.replace(learnt, select="uniform", out=str(tmp_path / "uniform"))
    compress(dataclasses.replace(plain, calibration=()))
    nats = []
    for name in ("learnt", "uniform"):
        measured = evaluate(
            EvaluateConfig(
                model=str(model),
                bundle=str(tmp_path / name),
                text=(str(tmp_path / "held-out.txt"),),
                seq_len=128,
            )
        )
        setting = measured.settings["emulator_zero_shot"]
        assert setting is not None
        assert setting.perplexity is not None
        nats.append(setting.perplexity.nats_per_token)
    assert nats[0] < nats[1] - 0.1
