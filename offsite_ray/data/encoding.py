# SPDX-License-Identifier: Apache-2.0
"""Documents to tokens, and which of them are to be predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import DataError

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
    """Return a document as tokens, ended by the tokenizer's end of text where it has one."""
    if "messages" in document:
        return _encode_chat(document["messages"], tokenizer)
    if "completion" in document:
        return _encode_pieces(
            [(document["prompt"], False), (document["completion"], True)], tokenizer
        )
    tokens = [*_tokens(document["text"], tokenizer), *_end(tokenizer)]
    if len(tokens) == len(_end(tokenizer)):
        tokens = []
    return Example(tokens=tuple(tokens), targets=(True,) * len(tokens), divisible=True)


def _encode_pieces(
    pieces: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase
) -> Example:
    tokens: list[int] = []
    targets: list[bool] = []
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
    for turn in range(1, len(messages) + 1):
        try:
            wanted = messages[turn - 1]["role"] == "assistant"
            whole = _rendered(messages[:turn], tokenizer)
            opening = _rendered(messages[: turn - 1], tokenizer, opened=True) if wanted else []
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"the chat template refuses a conversation: {reason}") from error
        known = max(len(tokens), len(opening))
        targets += [False] * (known - len(tokens)) + [wanted] * (len(whole) - known)
        tokens = whole
        if len(targets) != len(tokens):
            raise DataError(
                "the chat template rewrites earlier turns, so the assistant's words cannot be told "
                "apart; give {'prompt', 'completion'} instead"
            )
    return Example(tokens=tuple(tokens), targets=tuple(targets), divisible=False)


def _rendered(
    messages: list[Any], tokenizer: PreTrainedTokenizerBase, *, opened: bool = False
) -> list[int]:
    """Return a conversation's tokens; ``opened``: with the beginning of the next answer."""
    if not messages:
        return []
    rendered: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=opened
    )
    return list(rendered["input_ids"])


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
