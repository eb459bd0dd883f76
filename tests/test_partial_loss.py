# SPDX-License-Identifier: Apache-2.0
"""The loss without some blocks, block by block, and what greedy makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from offsite_ray.calibration import calibrate
from offsite_ray.calibration.losses import PartialLoss
from offsite_ray.emulator import compress
from offsite_ray.full_model import open_full_model
from tests.calibrations import SIX, batches, config, read_blocks, stock_states, tokens_of
from tests.stock import blocks_in, put_blocks, stock
from tests.tiny_models import save_tiny

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.loops import Loop


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


def _unchanged(family: str) -> Any:
    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, None) if family == "bloom" else hidden_states

    return forward


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
