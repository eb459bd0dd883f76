# SPDX-License-Identifier: Apache-2.0
"""Text of an answer, token by token, for both kinds of tokenizers that there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from offsite_ray.serving.text import GrowingText
from tests.tiny_models import tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT = "the cat sat on the mat"


def of_words() -> PreTrainedTokenizerBase:
    """Return a tokenizer that marks the beginning of words, as sentencepiece does."""
    words = ["<unk>", *(f"▁{word}" for word in sorted({*TEXT.split()}))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("tokenizer", [of_words(), tiny_tokenizer()], ids=["words", "bytes"])
@pytest.mark.parametrize("size", [1, 3])
def test_prompt_and_answer_are_one_text(tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    ids = list(tokenizer(TEXT)["input_ids"])
    text = GrowingText(tokenizer, prompt=ids[:size])
    answer = "".join(text.add(token) for token in ids[size:]) + text.end()
    assert str(tokenizer.decode(ids[:size])) + answer == TEXT


def test_a_stop_string_over_tokens_ends_it() -> None:
    tokenizer = tiny_tokenizer()
    text = GrowingText(tokenizer, ["on t", "zebra"])
    said = ""
    for token in tokenizer(TEXT)["input_ids"]:
        said += text.add(token)
        assert TEXT.startswith(said)
        if text.stopped:
            break
    assert (said, text.stopped) == ("the cat sat ", True)
