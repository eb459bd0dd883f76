# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens to calibrate on, and what stock transformers makes of each document in them."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from offsite_ray.architectures import block_model
from offsite_ray.calibration import forward
from offsite_ray.calibration.text import batches_of
from offsite_ray.config import CompressConfig
from tests.stock import blocks_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pytest
    from torch import Tensor

    from offsite_ray.training.protocols import Batch

SIX = ("gpt2", "opt", "bloom", "llama", "qwen3", "gemma3_text")
"""The families of which every method is tried."""

NOT_APART = ("opt", "bloom")
"""Those of them that read packed documents as one, whatever the positions say."""

ENDS = (7, 12)
"""Behind which tokens a document ends in the rows of :func:`packed`."""


def tokens_of(count: int = 6, length: int = 16) -> Tensor:
    """Return tokens ``(count, length)``, none of them the end of the text."""
    return torch.randint(1, 128, (count, length), generator=torch.Generator().manual_seed(1))


def rows_of(tokens: Tensor) -> list[dict[str, Tensor]]:
    """Return rows of one document each."""
    return [{"input_ids": row, "labels": row} for row in tokens]


def packed(tokens: Tensor) -> list[dict[str, Tensor]]:
    """Return rows of several documents, of which the last is a prompt but for its last token."""
    length = tokens.shape[1]
    begins = (0, *ENDS)
    sizes = [end - begin for begin, end in zip(begins, (*ENDS, length), strict=True)]
    positions = torch.cat([torch.arange(size) for size in sizes])
    labels = tokens.clone()
    labels[:, list(begins)] = -100
    labels[:, begins[-1] : length - 1] = -100
    return [
        {"input_ids": row, "labels": label, "position_ids": positions}
        for row, label in zip(tokens, labels, strict=True)
    ]


def batches(tokens: Tensor, size: int = 2) -> list[Batch]:
    """Return rows of one document each, some to a batch."""
    return [part for few in torch.split(tokens, size) for part in batches_of(rows_of(few))]


def documents(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tokens and the labels of each document, ``(1, T)``."""
    for number, row in enumerate(batch["input_ids"]):
        labels = batch["labels"][number]
        positions = batch.get("position_ids")
        begins = [0] if positions is None else (positions[number] == 0).nonzero()[:, 0].tolist()
        for begin, end in zip(begins, [*begins[1:], len(row)], strict=True):
            yield row[None, begin:end], labels[None, begin:end]


def summed_loss(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of a document, summed over what is to be predicted."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")


@torch.no_grad()
def mean_loss(model: Any, given: list[Batch]) -> float:
    """Return the mean cross-entropy of documents, each read on its own."""
    pairs = [pair for batch in given for pair in documents(batch)]
    count = sum(int((labels[:, 1:] != -100).sum()) for _, labels in pairs)
    return sum(float(summed_loss(model, *pair)) for pair in pairs) / count


def read_blocks(monkeypatch: pytest.MonkeyPatch, most: int = 1) -> list[int]:
    """Return a list that gets the index of each block that is read from the disk.

    Args:
        monkeypatch: Undoes it.
        most: Blocks that may be in memory when another is read.
    """
    found: list[int] = []
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    read = block_model

    def counted(config: Any, arch: Any, indices: Any, disk: Any) -> Any:
        found.extend(indices)
        gc.collect()
        assert len(alive) <= most
        model = read(config, arch, indices, disk)
        alive.add(blocks_in(model)[0])
        return model

    monkeypatch.setattr(forward, "block_model", counted)
    return found


def config(model: Path, out: Path, text: Path, **given: Any) -> CompressConfig:
    return CompressConfig(
        model=str(model),
        out=str(out),
        calibration=(str(text),),
        **{"plan": "1-2-1", "calibration_sequences": 6, "calibration_seq_len": 16, **given},
    )


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
