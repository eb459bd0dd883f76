# SPDX-License-Identifier: Apache-2.0
"""Documents to tokens, and which of them are to be predicted."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import DataError, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A document as tokens."""

    tokens: tuple[int, ...]
    targets: tuple[bool, ...]
    """Whether each token is to be predicted."""
    divisible: bool
    """Whether it may be cut at the end of a block: running text may, a completion may not."""


def encode(document: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Return a document as tokens.

    It begins as the tokenizer begins a text, and ends with its end of text, where it has these.
    """
    if "messages" in document:
        return _encode_chat(document["messages"], tokenizer)
    if "completion" in document:
        return _encode_pieces(
            [(document["prompt"], False), (document["completion"], True)], tokenizer
        )
    tokens = _tokens(document["text"], tokenizer)
    if tokens:
        tokens = [*_begin(tokenizer), *tokens, *_end(tokenizer)]
    return Example(tokens=tuple(tokens), targets=(True,) * len(tokens), divisible=True)


def _encode_pieces(
    pieces: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase
) -> Example:
    tokens = _begin(tokenizer)
    targets = [False] * len(tokens)
    for text, wanted in pieces:
        piece = _tokens(text, tokenizer)
        tokens += piece
        targets += [wanted] * len(piece)
    end = _end(tokenizer)
    return Example(
        tokens=(*tokens, *end), targets=(*targets, *(True for _ in end)), divisible=False
    )


def _encode_chat(messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Return a conversation by the tokenizer's own template; the assistant's turns are targets."""
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, so {'messages'} cannot be told apart; give "
            "{'prompt', 'completion'} instead"
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
    targets += [False] * (len(whole) - len(tokens))
    return Example(tokens=tuple(whole), targets=tuple(targets), divisible=False)


def _role(message: Any) -> str:
    fields = message if isinstance(message, dict) else {}
    role = fields.get("role")
    if not isinstance(role, str) or not {"content", "tool_calls"} & set(fields):
        raise DataError('every one of {"messages"} needs a "role" (a text) and a "content"')
    return role


def _check_begins(longer: list[int], shorter: list[int]) -> None:
    if longer[: len(shorter)] != shorter:
        raise DataError(
            "the chat template rewrites earlier turns, so the assistant's words cannot be told "
            "apart; give {'prompt', 'completion'} instead"
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


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text, as it does when a model is evaluated."""
    text: Any = tokenizer("a", return_special_tokens_mask=True)
    marked = zip(text["input_ids"], text["special_tokens_mask"], strict=True)
    return [token for token, _ in takewhile(lambda pair: pair[1], marked)]


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
