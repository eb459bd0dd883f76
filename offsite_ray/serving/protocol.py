# SPDX-License-Identifier: Apache-2.0
"""OpenAI's HTTP protocol: what clients send and get, as typed values.

What a client may ask for and would not get is refused, not left out: a penalty that is not applied
is a wrong answer.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from offsite_ray.errors import RequestError
from offsite_ray.serving.requests import Sampling

# A client is told of the first thing that is wrong: a list has millions of others.
Text = Annotated[str, Field(max_length=2**22)]
Token = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Texts = Annotated[list[Text], Field(fail_fast=True)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]
Prompts = Annotated[list[Tokens], Field(fail_fast=True)]
_MAX_KEYS = 64


def _only(*harmless: Any) -> BeforeValidator:
    """Return what lets pass None and the values that ask for nothing, as None, and no other."""
    allowed = "".join(f", or send {json.dumps(value)}" for value in harmless)

    def check(value: Any) -> None:
        if value is not None and value not in harmless:
            raise PydanticCustomError(
                "not_served",
                "{value} asks for what is not served; leave it out{allowed}",
                {"value": json.dumps(value)[:_MAX_QUOTED], "allowed": allowed},
            )

    return BeforeValidator(check)


_MAX_QUOTED = 100
"""Characters of a value."""


class _Strict(BaseModel):
    """An object of which every field is known."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_few(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MAX_KEYS:
            raise PydanticCustomError("too_many", "an object may have {n} keys", {"n": _MAX_KEYS})
        return value


class _Asked(_Strict):
    """Fields that both kinds of completion have."""

    model: Annotated[str, Field(max_length=200)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float | None, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """Not OpenAI's; 0 takes all tokens."""
    n: Annotated[int | None, Field(ge=1, le=16)] = 1
    seed: int | None = None
    stop: Text | Texts | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Any = None
    metadata: Any = None
    store: Annotated[None, _only(False)] = None
    frequency_penalty: Annotated[None, _only(0)] = None
    presence_penalty: Annotated[None, _only(0)] = None
    logit_bias: Annotated[None, _only({})] = None

    def _sampling(self, max_tokens: int, **given: Any) -> Sampling:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=tuple(stop),
            n=self.n or 1,
            **given,
        )


class StreamOptions(_Strict):
    """What a stream ends with."""

    include_usage: bool | None = False
    include_obfuscation: Annotated[None, _only(False)] = None


class CompletionRequest(_Asked):
    """``POST /v1/completions``."""

    prompt: Text | Texts | Tokens | Prompts
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    echo: bool | None = False
    suffix: Annotated[None, _only("")] = None
    best_of: Annotated[None, _only(1)] = None

    def sampling(self) -> Sampling:
        """Return how tokens are chosen; 16 of them where the client names no number."""
        return self._sampling(self.max_tokens or 16, logprobs=self.logprobs, echo=bool(self.echo))


class Part(_Strict):
    """A piece of what somebody says."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)]
    name: str | None = None
    # An answer that a client sends back as it got it has these.
    refusal: Annotated[None, _only()] = None
    annotations: Annotated[None, _only([])] = None
    audio: Annotated[None, _only()] = None
    function_call: Annotated[None, _only()] = None
    tool_calls: Annotated[None, _only([])] = None

    def plain(self) -> dict[str, str]:
        """Return it as chat templates read it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Asked):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024, fail_fast=True)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: Annotated[None, _only({"type": "text"})] = None
    tools: Annotated[None, _only([])] = None
    tool_choice: Annotated[None, _only("none", "auto")] = None
    parallel_tool_calls: Annotated[None, _only(True, False)] = None

    def sampling(self, room: int) -> Sampling:
        """Return how tokens are chosen.

        Args:
            room: Tokens of an answer where the client names no number.
        """
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        wanted = self.max_completion_tokens or self.max_tokens or room
        return self._sampling(wanted, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


FIELDS = frozenset(
    name
    for kind in (CompletionRequest, ChatRequest, Message, Part, StreamOptions)
    for name in kind.model_fields
)
"""Of what clients send."""


class Usage(BaseModel):
    """Tokens of an answer, by which it is billed."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ErrorBody(BaseModel):
    """What is wrong with a request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorObject(BaseModel):
    """What a refused request is answered with."""

    error: ErrorBody


def error_object(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    body = ErrorBody(message=message, type=kind, param=param, code=code)
    return ErrorObject(error=body).model_dump()


_Asked.model_rebuild()
