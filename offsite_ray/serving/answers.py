# SPDX-License-Identifier: Apache-2.0
"""Answers of the engine as the objects of OpenAI's API, whole or chunk by chunk.

The two kinds of completion differ in how a choice is written, and in nothing else: each is a row of
:data:`COMPLETION` and :data:`CHAT`.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from transformers import PreTrainedTokenizerBase

    from offsite_ray.serving.protocol import Usage
    from offsite_ray.serving.requests import Piece, TokenLogprob

    Words = Callable[[int], str]
    """Text of a token."""


@dataclass(kw_only=True, slots=True)
class Choice:
    """One of the texts that were asked for, as far as it is known."""

    index: int
    prompt: str = ""
    """Text of the prompt, where it is to be repeated."""
    first: int | None = None
    """First token of the prompt, where those of the prompt are to be explained; nothing came
    before it, so nobody knows how likely it was."""
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    offset: int = 0
    """Characters of the tokens that were explained in earlier parts."""

    def add(self, piece: Piece) -> None:
        """Take a piece of the text."""
        self.text += piece.text
        self.logprobs += [*piece.prompt_logprobs, *piece.logprobs]
        self.finish = piece.finish or self.finish

    @property
    def explained(self) -> list[int]:
        """The tokens that are explained here."""
        first = [] if self.first is None else [self.first]
        return [*first, *(one.token for one in self.logprobs)] if self.logprobs else []


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """How a kind of completion is written."""

    prefix: str
    """Of ids."""
    whole: str
    """``object`` of an answer."""
    chunk: str
    """``object`` of a part of it."""
    choice: Callable[[Choice, Words, bool], dict[str, Any]]
    """A choice; the last argument tells whether as a part."""
    opening: Callable[[int], dict[str, Any]] | None = None
    """What a stream begins a choice with."""


@dataclass(kw_only=True, slots=True)
class Head:
    """What all objects of an answer have in common."""

    id: str
    model: str
    kind: Kind
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Iterable[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """Return an answer."""
        return {
            **self._common(self.kind.whole),
            "choices": list(choices),
            "usage": usage.model_dump(),
        }

    def chunk(
        self, choices: Sequence[dict[str, Any]], usage: Usage | None = None, *, with_usage: bool
    ) -> dict[str, Any]:
        """Return a part of a stream.

        Args:
            choices: Each with what is new.
            usage: In the last one, where it was asked for.
            with_usage: Whether it was: then every part says at least that there is none yet.
        """
        found = {**self._common(self.kind.chunk), "choices": list(choices)}
        if with_usage:
            found["usage"] = None if usage is None else usage.model_dump()
        return found

    def _common(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def words_of(tokenizer: PreTrainedTokenizerBase) -> Words:
    """Return what gives the text of a token by itself."""

    def text(token: int) -> str:
        found = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        assert isinstance(found, str)
        return found

    return text


def _completion_choice(choice: Choice, words: Words, part: bool) -> dict[str, Any]:
    return {
        "index": choice.index,
        "text": choice.prompt + choice.text,
        "logprobs": _completion_logprobs(choice, words),
        "finish_reason": choice.finish,
    }


def _completion_logprobs(choice: Choice, words: Words) -> dict[str, Any] | None:
    if not choice.logprobs:
        return None
    tokens = [words(token) for token in choice.explained]
    unknown = [None] * (choice.first is not None)
    return {
        "tokens": tokens,
        "token_logprobs": [*unknown, *(one.logprob for one in choice.logprobs)],
        "top_logprobs": [*unknown, *(_named(one, words) for one in choice.logprobs)],
        "text_offset": [*itertools.accumulate(map(len, tokens[:-1]), initial=choice.offset)],
    }


def _named(one: TokenLogprob, words: Words) -> dict[str, float]:
    """Return the likeliest tokens by their text; of several with one text, the likeliest."""
    found: dict[str, float] = {}
    for token, logprob in one.top.items():
        found.setdefault(words(token), logprob)
    return found


def _chat_choice(choice: Choice, words: Words, part: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"content": choice.text}
    if part:
        content = {"delta": said if choice.text else {}}
    else:
        content = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
    logprobs = [_chat_logprob(one, words) for one in choice.logprobs]
    return {
        "index": choice.index,
        **content,
        "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
        "finish_reason": choice.finish,
    }


def _chat_logprob(one: TokenLogprob, words: Words) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = words(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    top = [entry(token, logprob) for token, logprob in one.top.items()]
    return {**entry(one.token, one.logprob), "top_logprobs": top}


def _chat_opening(index: int) -> dict[str, Any]:
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


COMPLETION = Kind(
    prefix="cmpl-", whole="text_completion", chunk="text_completion", choice=_completion_choice
)
CHAT = Kind(
    prefix="chatcmpl-",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    choice=_chat_choice,
    opening=_chat_opening,
)
