# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a causal language model: token-weighted, the same at any batch size.

Each document is cut into windows of ``seq_len`` tokens that overlap by one, so that every token but
a document's first is predicted exactly once. Shapes: ``B`` windows, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from offsite_ray.errors import ConfigError, DataError, TrainingError
from offsite_ray.results import Perplexity

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.configuration_utils import PretrainedConfig

MAX_DEFAULT_SEQ_LEN = 1024
"""Context in tokens where the user asks for none and the model allows more."""

_MAX_LOGITS_BYTES = 2 * 2**30
"""Bytes of one forward pass's logits in float32, above which it takes fewer windows."""

CountFn = Callable[[int, int], None]
"""Told after each step how much is done: ``(done, total)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedDocument:
    """A document as the token ids that a model predicts."""

    token_ids: tuple[int, ...]
    """At least two: the first is context only."""
    num_bytes: int
    """UTF-8 bytes of the document."""


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[EncodedDocument]:
    """Return the documents that hold something to predict, with the tokenizer's special tokens.

    Raises:
        DataError: No document has two tokens.
    """
    documents = []
    for text in texts:
        # verbose=False: a document is longer than the model's context, and cut later.
        token_ids = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
        if len(token_ids) > 1:
            documents.append(
                EncodedDocument(token_ids=tuple(token_ids), num_bytes=len(text.encode()))
            )
    if not documents:
        raise DataError(
            f"{len(texts)} documents and none of them has 2 tokens, so nothing can be predicted; "
            "give a longer text"
        )
    return documents


def context_length(config: PretrainedConfig, seq_len: int | None) -> int:
    """Return the tokens of a window: ``seq_len``, or by default what the model allows up to 1024.

    Raises:
        ConfigError: The model has fewer positions, or a window would predict nothing.
    """
    allowed = getattr(config.get_text_config(), "max_position_embeddings", None)
    if seq_len is None:
        return min(allowed or MAX_DEFAULT_SEQ_LEN, MAX_DEFAULT_SEQ_LEN)
    if seq_len < 2:
        raise ConfigError(f"seq_len={seq_len} must be at least 2, to predict one token")
    if allowed is not None and seq_len > allowed:
        raise ConfigError(f"seq_len={seq_len} is more than the model's {allowed} positions")
    return seq_len


def perplexity(
    model: PreTrainedModel,
    documents: Sequence[EncodedDocument],
    *,
    seq_len: int,
    batch_size: int,
    progress: CountFn | None = None,
) -> Perplexity:
    """Return the token-weighted loss of ``model`` on ``documents``.

    Args:
        model: In evaluation mode, on the device that does the work.
        documents: As :func:`encode` returns them.
        seq_len: Tokens of a window.
        batch_size: Windows of a forward pass; fewer where the logits would take over 2 GiB.
        progress: Told the windows done and their total.

    Raises:
        TrainingError: The loss of a window is not finite.
    """
    windows = sorted(_windows(documents, seq_len), key=len, reverse=True)
    step = _windows_per_pass(model, min(seq_len, len(windows[0])), batch_size)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(windows), step):
        batch = windows[start : start + step]
        total += _summed_loss(model, batch)
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss of the windows {start} to {start + len(batch) - 1} is {float(total)}; "
                "the model has non-finite weights, or its arithmetic overflows: try --dtype fp32"
            )
        if progress is not None:
            progress(start + len(batch), len(windows))
    num_tokens = sum(len(window) - 1 for window in windows)
    num_bytes = sum(document.num_bytes for document in documents)
    return Perplexity(
        nats_per_token=float(total) / num_tokens,
        nats_per_byte=float(total) / num_bytes,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
    )


def _windows(documents: Sequence[EncodedDocument], seq_len: int) -> Iterator[tuple[int, ...]]:
    for document in documents:
        for start in range(0, len(document.token_ids) - 1, seq_len - 1):
            yield document.token_ids[start : start + seq_len]


def _windows_per_pass(model: PreTrainedModel, num_tokens: int, batch_size: int) -> int:
    window_bytes = 4 * num_tokens * int(model.config.get_text_config().vocab_size)
    return max(1, min(batch_size, _MAX_LOGITS_BYTES // window_bytes))


@torch.inference_mode()
def _summed_loss(model: PreTrainedModel, batch: Sequence[tuple[int, ...]]) -> Tensor:
    """Return the summed loss of a batch, float64 on the CPU; windows are padded on the right."""
    longest = max(map(len, batch))
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, window in enumerate(batch):
        input_ids[row, : len(window)] = torch.tensor(window)
        attention_mask[row, : len(window)] = 1
    logits = model(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        use_cache=False,
    ).logits
    labels = input_ids.masked_fill(attention_mask == 0, -100).to(model.device)
    # Row by row, so that the float32 copy of the logits is (T, V) and not (B, T, V).
    losses = [
        functional.cross_entropy(logits[row, :-1].float(), labels[row, 1:], reduction="sum")
        for row in range(len(batch))
    ]
    return torch.stack(losses).double().sum().cpu()
