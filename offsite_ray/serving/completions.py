# SPDX-License-Identifier: Apache-2.0
"""OpenAI's routes: models, completions, chat completions; whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from offsite_ray.errors import RequestError
from offsite_ray.serving.answering import growing, whole
from offsite_ray.serving.answers import CHAT, COMPLETION, Choice, Head, words_of
from offsite_ray.serving.asks import Ask
from offsite_ray.serving.failures import failure_of
from offsite_ray.serving.front import TAKES_A_KEY
from offsite_ray.serving.protocol import ChatRequest, CompletionRequest, Usage
from offsite_ray.serving.routing import BASE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from offsite_ray.serving.answers import Kind, Words
    from offsite_ray.serving.front import Front
    from offsite_ray.serving.requests import Piece, Sampling

_LOG = logging.getLogger("ray.serve")

_MAX_PROMPTS = 64
"""Of one request."""
_CHARACTERS = 64
"""Of a text for each token that a prompt may have: a longer one is not even tokenised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """What one HTTP request asks for."""

    head: Head
    asks: list[Ask]
    prompts: list[str]
    """Text of each prompt, where it is to be repeated; empty otherwise."""
    sampling: Sampling
    stream: bool
    with_usage: bool

    def choice(self, place: int, index: int) -> Choice:
        """Return one of the texts of a prompt, still empty."""
        ask = self.asks[place]
        explains = self.sampling.echo and self.sampling.logprobs is not None
        return Choice(
            index=place * self.sampling.n + index,
            prompt=self.prompts[place],
            first=ask.prompt[0] if explains else None,
        )

    def usage(self, num_tokens: int) -> Usage:
        """Return what is billed for so many tokens of answers."""
        prompts = sum(len(ask.prompt) for ask in self.asks)
        return Usage(
            prompt_tokens=prompts,
            completion_tokens=num_tokens,
            total_tokens=prompts + num_tokens,
        )


def completion_routes(front: Front) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"], dependencies=[TAKES_A_KEY])
    words = words_of(front.tokenizer)

    @router.get("/models")
    async def models(request: Request) -> dict[str, Any]:
        """List the models that the key may use."""
        names = front.gate.models(request.state.caller)
        return {"object": "list", "data": [_model(front, name) for name in names]}

    @router.get("/models/{model}")
    async def one_model(model: str, request: Request) -> dict[str, Any]:
        """Return one of these models."""
        front.gate.version(request.state.caller, model)
        return _model(front, model)

    @router.post("/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Any:
        """Continue a text."""
        version = _version(front, request, asked.model)
        sampling = asked.sampling()
        prompts = await asyncio.to_thread(_prompts, front, asked.prompt)
        texts = [_text(front, asked, place, tokens) for place, tokens in enumerate(prompts)]
        job = _job(request, asked, COMPLETION, version, prompts, texts, sampling)
        return await _answer(front, job, words)

    @router.post("/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Any:
        """Say the next thing in a conversation; the tokenizer's chat template writes the prompt."""
        version = _version(front, request, asked.model)
        prompt = await asyncio.to_thread(_chat_prompt, front, asked)
        room = min(_CHAT_TOKENS, front.config.max_output, front.max_positions - len(prompt))
        job = _job(request, asked, CHAT, version, [prompt], [""], asked.sampling(max(room, 1)))
        return await _answer(front, job, words)

    return router


_CHAT_TOKENS = 256
"""Of an answer, where the client names no number."""


def _version(front: Front, request: Request, model: str) -> int:
    """Return the number of the version that a request is answered by."""
    version = front.gate.version(request.state.caller, model)
    request.state.model = model
    return BASE if version is None else version.number


def _model(front: Front, name: str) -> dict[str, Any]:
    version = front.gate.snapshot.tenants.get(name)
    created = 0 if version is None else int(datetime.fromisoformat(version.added).timestamp())
    return {"id": name, "object": "model", "created": created, "owned_by": "offsite-ray"}


def _prompts(front: Front, given: Any) -> list[tuple[int, ...]]:
    """Return the tokens of each prompt.

    Raises:
        RequestError: There is none, or there are too many, or one is far too long.
    """
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not 0 < len(given) <= _MAX_PROMPTS:
        raise RequestError(f"prompt takes 1 to {_MAX_PROMPTS} texts, not {len(given)}", "prompt")
    longest = max((len(prompt) for prompt in given if not isinstance(prompt, str)), default=0)
    if longest > front.config.max_prompt:
        raise RequestError(
            f"prompt has {longest} tokens; up to {front.config.max_prompt} are allowed", "prompt"
        )
    return [_tokens(front, text) if isinstance(text, str) else tuple(text) for text in given]


def _tokens(front: Front, text: str) -> tuple[int, ...]:
    _check_length(front, text)
    return tuple(front.tokenizer(text)["input_ids"])


def _check_length(front: Front, text: str) -> None:
    most = _CHARACTERS * front.config.max_prompt
    if len(text) > most:
        raise RequestError(f"prompt has {len(text)} characters; up to {most} are allowed", "prompt")


def _text(front: Front, asked: CompletionRequest, place: int, tokens: Sequence[int]) -> str:
    """Return the text of a prompt, where the client wants it repeated."""
    if not asked.echo:
        return ""
    if isinstance(asked.prompt, str):
        return asked.prompt
    given = asked.prompt[place]
    if isinstance(given, str):
        return given
    text = front.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _chat_prompt(front: Front, asked: ChatRequest) -> tuple[int, ...]:
    """Return the tokens that the chat template makes of a conversation.

    Raises:
        RequestError: There is no template, or it does not take this conversation.
    """
    if not front.tokenizer.chat_template:
        raise RequestError(
            "this model has no chat template; use /v1/completions with the whole text", "messages"
        )
    messages = [message.plain() for message in asked.messages]
    _check_length(front, "".join(message["content"] for message in messages))
    import jinja2

    try:
        tokens = front.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise RequestError(
            f"the chat template takes no such messages: {error}", "messages"
        ) from None
    return tuple(tokens)


def _job(
    request: Request,
    asked: CompletionRequest | ChatRequest,
    kind: Kind,
    version: int,
    prompts: Sequence[tuple[int, ...]],
    texts: list[str],
    sampling: Sampling,
) -> _Job:
    asks = [
        Ask(
            id=f"{request.state.id}-{place}",
            model=asked.model,
            version=version,
            prompt=prompt,
            sampling=sampling,
        )
        for place, prompt in enumerate(prompts)
    ]
    options = asked.stream_options
    return _Job(
        head=Head(id=kind.prefix + request.state.id, model=asked.model, kind=kind),
        asks=asks,
        prompts=texts,
        sampling=sampling,
        stream=bool(asked.stream),
        with_usage=options is not None and bool(options.include_usage),
    )


async def _answer(front: Front, job: _Job, words: Words) -> Any:
    """Return an answer, or a stream whose first piece is there: until then errors have a status."""
    if job.stream:
        events = _events(front, job, words)
        first = await anext(events)
        return StreamingResponse(
            _chained(first, events),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    async with asyncio.timeout(front.config.request_timeout):
        answers = await whole(front.engines, job.asks)
    choices, num_tokens = [], 0
    for place, pieces in enumerate(answers):
        found = [job.choice(place, index) for index in range(job.sampling.n)]
        for piece in pieces:
            found[piece.index].add(piece)
            num_tokens += len(piece.tokens)
        choices += found
        _log_text(front, job, place, [choice.text for choice in found])
    kind = job.head.kind
    return job.head.whole(
        [kind.choice(choice, words, False) for choice in choices], job.usage(num_tokens)
    )


async def _events(front: Front, job: _Job, words: Words) -> AsyncGenerator[str]:
    """Yield an answer as server-sent events; of one that is cut off, the last is the error.

    Raises:
        OffsiteError: Before the first of them.
    """
    begun: dict[tuple[int, int], _Told] = {}
    num_tokens = 0
    until = asyncio.get_running_loop().time() + front.config.request_timeout
    try:
        async with contextlib.aclosing(growing(front.engines, job.asks)) as news:
            # Each piece by itself: another task goes on with this generator than began it.
            while (new := await _next(news, until)) is not None:
                place, pieces = new
                for piece in pieces:
                    num_tokens += len(piece.tokens)
                    if (event := _event(job, words, begun, place, piece)) is not None:
                        yield event
    except Exception as error:
        if not begun:
            raise
        _LOG.warning("stream %s was cut off: %s", job.head.id, error)
        yield _sse(failure_of(error).body)
        return
    for (place, _), told in begun.items():
        _log_text(front, job, place, [told.text])
    if job.with_usage:
        yield _sse(job.head.chunk([], job.usage(num_tokens), with_usage=True))
    yield "data: [DONE]\n\n"


async def _next(
    news: AsyncGenerator[tuple[int, Sequence[Piece]]], until: float
) -> tuple[int, Sequence[Piece]] | None:
    """Return what is new; None at the end. Raises TimeoutError after a time of the loop."""
    async with asyncio.timeout_at(until):
        return await anext(news, None)


@dataclass(slots=True)
class _Told:
    """What a client of a stream has of one text."""

    text: str = ""
    offset: int = 0
    """Characters of the tokens that were explained."""


def _event(
    job: _Job, words: Words, begun: dict[tuple[int, int], _Told], place: int, piece: Piece
) -> str | None:
    """Return what a piece is in a stream; None of one that says nothing by itself."""
    kind = job.head.kind
    choice = job.choice(place, piece.index)
    opened = (place, piece.index) in begun
    if opened:
        choice.prompt, choice.first = "", None
        choice.offset = begun[place, piece.index].offset
    choice.add(piece)
    if not (choice.prompt or choice.text or choice.logprobs or choice.finish):
        return None
    told = begun.setdefault((place, piece.index), _Told())
    told.text += piece.text
    told.offset += sum(len(words(token)) for token in choice.explained)
    part = kind.choice(choice, words, True)
    event = _sse(job.head.chunk([part], with_usage=job.with_usage))
    if kind.opening is not None and not opened:
        opening = kind.opening(choice.index)
        event = _sse(job.head.chunk([opening], with_usage=job.with_usage)) + event
    return event


async def _chained(first: str, rest: AsyncGenerator[str]) -> AsyncGenerator[str]:
    async with contextlib.aclosing(rest):
        yield first
        async for event in rest:
            yield event


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _log_text(front: Front, job: _Job, place: int, texts: Sequence[str]) -> None:
    if front.config.log_prompts:
        prompt = front.tokenizer.decode(list(job.asks[place].prompt))
        _LOG.info("request %s: %r is answered by %r", job.asks[place].id, prompt, texts)
