# SPDX-License-Identifier: Apache-2.0
"""The rows that the full model is shown: which are drawn, and what is seen and scored in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from offsite_ray.calibration import blockwise_forward, calibrate
from offsite_ray.calibration.losses import PartialLoss
from offsite_ray.calibration.replacement import MixedModel
from offsite_ray.calibration.text import as_trained, batches_of
from offsite_ray.data import write_blocks
from offsite_ray.full_model import open_full_model
from tests.calibrations import (
    NOT_APART,
    SIX,
    config,
    documents,
    mean_loss,
    packed,
    stock_states,
    tokens_of,
)
from tests.harmonizers import HOW, MIDDLE
from tests.stock import stock
from tests.texts import write_rows
from tests.tiny_models import END_OF_TEXT, save_tiny, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.loops import Loop


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
def test_documents_in_a_row_are_judged_on_their_own(tmp_path: Path, family: str) -> None:
    full = open_full_model(save_tiny(family, tmp_path / "model"))
    (batch,) = batches_of(as_trained(packed(tokens_of()), full))
    mixed = MixedModel(full, MIDDLE, HOW)
    expected = mean_loss(stock(full.path), [batch])
    assert mixed.loss(batch, MIDDLE) == pytest.approx(expected, rel=1e-5)
    for _ in range(5):
        mixed.train(batch, [2, 3])
    assert mixed.loss(batch, MIDDLE) == pytest.approx(expected, rel=1e-5)
