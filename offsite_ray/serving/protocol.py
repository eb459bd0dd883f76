# SPDX-License-Identifier: Apache-2.0
"""OpenAI's HTTP protocol: what clients send and get, as typed values.

What a client may ask for and would not get is refused, not left out: a penalty that is not applied
is a wrong answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from offsite_ray.serving.requests import Sampling

Stop = str | list[str] | None


class _Asked(BaseModel):
    """Fields that both kinds of completion have."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float | None, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """Not OpenAI's; 0 takes all tokens."""
    n: Annotated[int | None, Field(ge=1, le=16)] = 1
    seed: int | None = None
    stop: Stop = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: Literal[0, None] = None
    presence_penalty: Literal[0, None] = None
    logit_bias: dict[str, Literal[0]] | None = None

    def sampling(self, *, max_tokens: int, logprobs: int | None) -> Sampling:
        """Return how tokens are chosen.

        Args:
            max_tokens: Where the client names no number.
            logprobs: How many likely tokens to name.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=self.max_tokens or max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=tuple(stop),
            logprobs=logprobs,
            n=self.n or 1,
        )


class StreamOptions(BaseModel):
    """What a stream ends with."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class CompletionRequest(_Asked):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    echo: bool | None = False
    suffix: Literal["", None] = None
    best_of: int | None = None


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str
    name: str | None = None


class ChatRequest(_Asked):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None


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


def error_object(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    body = ErrorBody(message=message, type=kind, param=param, code=code)
    return {"error": body.model_dump()}


_Asked.model_rebuild()
