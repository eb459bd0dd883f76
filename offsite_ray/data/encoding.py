# SPDX-License-Identifier: Apache-2.0
"""Documents to tokens, and which of them are to be predicted."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from offsite_ray.errors import DataError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from offsite_ray.data.documents import Document


@dataclass(frozen=True, slots=True)
class Example:
    """A document as tokens."""

    tokens: np.ndarray[Any, Any]
    """``(L,)`` int32."""
    targets: np.ndarray[Any, Any]
    """``(L,)`` bool: whether each token is to be predicted."""
    divisible: bool
    """Whether it may be cut at the end of a block: running text may, a completion may not."""


class Encoder:
    """Makes tokens of documents, many at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Ask the tokenizer how a text begins and ends."""
        self._tokenizer = tokenizer
        self._begin = _begin(tokenizer)
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.pad = int(tokenizer.pad_token_id or 0)

    def __call__(self, documents: Sequence[Document]) -> Iterator[Example]:
        """Yield each document as tokens.

        It begins as the tokenizer begins a text, and ends with its end of text, where it has these.

        Raises:
            DataError: A conversation cannot be told apart.
        """
        texts = [_pieces(document.fields) for document in documents]
        tokens = iter(self._tokens(list(chain.from_iterable(texts))))
        for document, pieces in zip(documents, texts, strict=True):
            encoded = [next(tokens) for _ in pieces]
            if "messages" in document.fields:
                yield self._chat(document)
            elif "completion" in document.fields:
                prompt, completion = encoded
                yield self._joined(prompt, completion, divisible=False)
            else:
                yield self._joined([], *encoded, divisible=True)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found: Any = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return list(found["input_ids"])

    def _joined(self, prompt: list[int], wanted: list[int], *, divisible: bool) -> Example:
        if divisible and not wanted:
            return _example([], [], divisible=True)
        tokens = [*self._begin, *prompt, *wanted, *self._end]
        targets = np.ones(len(tokens), dtype=bool)
        if not divisible:
            targets[: len(self._begin) + len(prompt)] = False
        return _example(tokens, targets, divisible=divisible)

    def _chat(self, document: Document) -> Example:
        """Return a conversation by the tokenizer's own template; the assistant's are targets."""
        try:
            tokens, targets = _conversation(document.fields["messages"], self._tokenizer)
        except DataError as error:
            raise DataError(f"{document.where}: {error}") from error
        return _example(tokens, targets, divisible=False)


def _example(tokens: list[int], targets: Any, *, divisible: bool) -> Example:
    return Example(
        np.asarray(tokens, dtype=np.int32), np.asarray(targets, dtype=bool), divisible=divisible
    )


def _pieces(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the texts of a document that are tokenised each on its own."""
    if "messages" in fields:
        return ()
    return (fields["prompt"], fields["completion"]) if "completion" in fields else (fields["text"],)


def _conversation(
    messages: list[Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and which of them are the assistant's."""
    if not tokenizer.chat_template:
        raise DataError(
            'the tokenizer has no chat template, so "messages" cannot be read; give "prompt" and '
            '"completion" instead'
        )
    tokens: list[int] = []
    targets: list[bool] = []
    answers = [turn for turn, message in enumerate(messages) if _role(message) == "assistant"]
    for turn in answers:
        opening = _rendered(messages[:turn], tokenizer, opened=True)
        answered = _rendered(messages[: turn + 1], tokenizer)
        for longer, shorter in ((opening, tokens), (answered, opening)):
            _check_begins(longer, shorter)
        targets += [False] * (len(opening) - len(tokens)) + [True] * (len(answered) - len(opening))
        tokens = answered
    whole = _rendered(messages, tokenizer)
    _check_begins(whole, tokens)
    return whole, targets + [False] * (len(whole) - len(tokens))


def _role(message: Any) -> str:
    fields = message if isinstance(message, dict) else {}
    role = fields.get("role")
    if not isinstance(role, str) or not {"content", "tool_calls"} & set(fields):
        raise DataError('every one of "messages" needs a "role" (a text) and a "content"')
    return role


def _check_begins(longer: list[int], shorter: list[int]) -> None:
    if longer[: len(shorter)] != shorter:
        raise DataError(
            "the chat template rewrites earlier turns, so the assistant's words cannot be told "
            'apart; give "prompt" and "completion" instead'
        )


def _rendered(
    messages: list[Any], tokenizer: PreTrainedTokenizerBase, *, opened: bool = False
) -> list[int]:
    """Return a conversation's tokens; ``opened``: with the beginning of the next answer."""
    if not messages:
        return []
    try:
        rendered: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=opened
        )
    except Exception as error:
        raise DataError(f"the chat template refuses a conversation: {first_line(error)}") from error
    return list(rendered["input_ids"])


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text, as it does when a model is evaluated."""
    text: Any = tokenizer("a", return_special_tokens_mask=True)
    marked = zip(text["input_ids"], text["special_tokens_mask"], strict=True)
    return [token for token, _ in takewhile(lambda pair: pair[1], marked)]
