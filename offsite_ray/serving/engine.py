# SPDX-License-Identifier: Apache-2.0
"""Continuous batching over tenants: requests join and leave between decoding steps.

One thread owns the model. A step of it lets requests in, computes one prefill, and then one token
of every row. What other threads do (submit, cancel, add a tenant) waits for the end of a step at
most.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from offsite_ray.errors import BusyError, RequestError
from offsite_ray.serving.queue import ANSWER_COST, PROMPT_COST, FairQueue
from offsite_ray.serving.requests import Piece, Request, Sampling
from offsite_ray.serving.sampling import Sampler
from offsite_ray.serving.text import GrowingText

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from offsite_ray.serving.cache import WindowCache
    from offsite_ray.serving.model import BatchModel
    from offsite_ray.serving.requests import FinishReason
    from offsite_ray.serving.residency import Residency

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the engine takes on at once."""

    max_rows: int = 16
    """Texts that are decoded at a time."""
    cache_tokens: int = 16 * 1024
    """Keys and values are held for so many tokens: rows times the longest of them."""
    max_queue: int = 128
    """Requests that may wait."""
    max_prompt: int = 4096
    """Tokens of a prompt."""
    max_output: int = 2048
    """Tokens of an answer."""
    prefill_tokens: int = 512
    """Prompt tokens that are computed between two decoding steps."""


@dataclass(kw_only=True, slots=True)
class _Row:
    """A text that is being written."""

    request: Request
    index: int
    sampler: Sampler
    text: GrowingText
    next: int = 0
    """Its last token, which the model has not seen yet."""
    num_tokens: int = 0


@dataclass(kw_only=True, slots=True)
class _Prefill:
    """Prompts that are computed together; a long one by itself, piece by piece."""

    requests: list[Request]
    cache: WindowCache
    done: int = 0
    """Tokens of the prompt that are computed already, of one by itself."""


@dataclass(kw_only=True, slots=True)
class Counts:
    """What the engine has done since it was started; read by anybody, written by its thread."""

    steps: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    rows: int = 0
    """Rows of all decoding steps; over ``steps``, how full the batch was."""
    failed: int = 0


@dataclass(kw_only=True, slots=True)
class _State:
    """What the thread works on."""

    rows: list[_Row] = field(default_factory=list)
    prefills: deque[_Prefill] = field(default_factory=deque)


class Engine:
    """Answers requests to many tenants' models, which share one trunk."""

    def __init__(
        self,
        model: BatchModel,
        tokenizer: PreTrainedTokenizerBase,
        residency: Residency,
        limits: Limits,
        *,
        vocab_size: int,
        max_positions: int,
        end_tokens: Iterable[int],
    ) -> None:
        """Take a model; nothing runs before :meth:`start`.

        Args:
            model: With the tenants' blocks routed.
            tokenizer: Of the model.
            residency: Knows the tenants, and which of them are in the model.
            limits: What is taken on at once.
            vocab_size: Token ids are below it.
            max_positions: Tokens that a prompt and its answer may have together.
            end_tokens: Tokens that end a text.
        """
        self._model, self._tokenizer = model, tokenizer
        self._residency, self.limits = residency, limits
        self._vocab_size, self._max_positions = vocab_size, max_positions
        self._ends = frozenset(end_tokens)
        self._queue = FairQueue()
        self._changed = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._state = _State()
        self._cache = model.new_cache()
        self._stopping = self._draining = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.counts = Counts()
        self.beat = time.monotonic()

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, drain_s: float = 0.0) -> None:
        """Take nothing more, and end: at once, or when all that was taken is answered.

        Args:
            drain_s: Seconds to wait for that.
        """
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: not self.num_running and not len(self._queue), drain_s)
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def is_healthy(self, patience_s: float = 60.0) -> bool:
        """Return whether the thread is at work, or has none to do."""
        return self._thread.is_alive() and time.monotonic() - self.beat < patience_s

    @property
    def num_running(self) -> int:
        """Texts that are being written or prepared."""
        waiting = sum(len(prefill.requests) for prefill in self._state.prefills)
        return len(self._state.rows) + waiting

    @property
    def num_waiting(self) -> int:
        """Requests that are not yet let in."""
        return len(self._queue)

    def submit(self, request: Request) -> None:
        """Have a request answered, piece by piece, through its ``tell``.

        Raises:
            RequestError: It cannot be answered here.
            BusyError: Too many wait already.
        """
        self._check(request.prompt, request.sampling)
        request.arrived = time.monotonic()
        request.unfinished = request.sampling.n
        with self._changed:
            if self._draining:
                raise BusyError("the service is about to end; ask again")
            if len(self._queue) >= self.limits.max_queue:
                raise BusyError(f"{len(self._queue)} requests wait already; ask again in a moment")
            self._residency.hold(request.tenant)
            self._queue.put(request)
            self._changed.notify_all()

    def cancel(self, request: Request) -> None:
        """Answer a request no further; its rows are free from the next step on."""
        with self._changed:
            request.cancelled = True
            self._changed.notify_all()

    def do(self, command: Callable[[], None]) -> None:
        """Have the engine's thread call something between two steps."""
        with self._changed:
            self._commands.append(command)
            self._changed.notify_all()

    def _check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        limits, longest = self.limits, len(prompt) + sampling.max_tokens
        if not prompt:
            raise RequestError("the prompt has no token; give at least one", "prompt")
        if not all(0 <= token < self._vocab_size for token in prompt):
            raise RequestError(
                f"the prompt has a token that is not below {self._vocab_size}, the size of the "
                "vocabulary",
                "prompt",
            )
        if len(prompt) > limits.max_prompt:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; up to {limits.max_prompt} are allowed",
                "prompt",
            )
        if sampling.max_tokens > limits.max_output:
            raise RequestError(
                f"max_tokens is {sampling.max_tokens}; up to {limits.max_output} are allowed",
                "max_tokens",
            )
        most = min(self._max_positions, limits.cache_tokens // sampling.n)
        if longest > most or sampling.n > limits.max_rows:
            raise RequestError(
                f"{sampling.n} x (prompt of {len(prompt)} tokens + max_tokens of "
                f"{sampling.max_tokens}) is more than fits here: {limits.max_rows} texts, up to "
                f"{most} tokens each; shorten the prompt or lower max_tokens or n",
                "max_tokens",
            )

    def _run(self) -> None:
        while not self._stopping:
            with self._changed:
                self._changed.wait_for(self._has_work, timeout=1.0)
            self.beat = time.monotonic()
            self._step()
        self._fail(self._everyone(), "the service has ended")

    def _has_work(self) -> bool:
        return bool(
            self._stopping or self._commands or len(self._queue) or self.num_running
        )

    def _step(self) -> None:
        """Obey, let in, compute a prefill and then a token of every row."""
        with self._changed:
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        self._drop_cancelled()
        self._admit()
        try:
            self._prefill()
            self._decode()
        except Exception:
            # Whatever it was, the thread goes on: those whose rows were computed are told.
            _LOG.exception("a step of the engine failed")
            self._fail(self._everyone(waiting=False), "the model failed; ask again")
            self._state, self._cache = _State(), self._model.new_cache()
        with self._changed:
            self._changed.notify_all()

    def _everyone(self, *, waiting: bool = True) -> list[Request]:
        prefilled = [r for prefill in self._state.prefills for r in prefill.requests]
        queued = list(self._queue) if waiting else []
        return list(dict.fromkeys([row.request for row in self._state.rows] + prefilled + queued))

    def _fail(self, requests: Iterable[Request], why: str) -> None:
        for request in requests:
            self.counts.failed += 1
            for index in range(request.sampling.n):
                self._tell(request, Piece(index=index, text="", finish="error", error=why))
            self._residency.release(request.tenant)

    def _drop_cancelled(self) -> None:
        """Free what requests have that nobody waits for any more."""
        state = self._state
        with self._changed:
            for request in [request for request in self._queue if request.cancelled]:
                self._queue.take(request)
                self._residency.release(request.tenant)
        gone = [place for place, row in enumerate(state.rows) if row.request.cancelled]
        for place in gone:
            self._finished(state.rows[place].request)
        self._drop(gone)
        for prefill in list(state.prefills):
            if all(request.cancelled for request in prefill.requests):
                state.prefills.remove(prefill)
                for request in prefill.requests:
                    self._residency.release(request.tenant)

    def _admit(self) -> None:
        """Let in those whose turn it is, as long as there is room for all that they may need."""
        with self._changed:
            room = self.limits.max_rows - len(self._state.rows)
            inside = [row.request for row in self._state.rows]
            for prefill in self._state.prefills:
                room -= sum(request.sampling.n for request in prefill.requests)
                inside += prefill.requests
            longest = max(map(_most_tokens, inside), default=0)
            while (request := self._next()) is not None:
                rows = self.limits.max_rows - room + request.sampling.n
                wide = max(longest, _most_tokens(request))
                if request.sampling.n > room or rows * wide > self.limits.cache_tokens:
                    return
                self._queue.take(request)
                self._queue.served(request.tenant, PROMPT_COST * len(request.prompt))
                room, longest = room - request.sampling.n, wide
                self._to_prefill(request)

    def _next(self) -> Request | None:
        """Return whose turn it is, of those whose tenant is in the model."""
        for request in self._queue.in_turn():
            if self._residency.is_here(request.tenant, self.do):
                return request
        return None

    def _to_prefill(self, request: Request) -> None:
        """Put a request beside others that fit into one forward, or by itself."""
        prefills = self._state.prefills
        if prefills and not prefills[-1].done:
            together = [*prefills[-1].requests, request]
            widest = max(len(other.prompt) for other in together)
            if widest * len(together) <= self.limits.prefill_tokens:
                prefills[-1].requests.append(request)
                prefills[-1].cache = self._model.new_cache(len(together))
                return
        prefills.append(_Prefill(requests=[request], cache=self._model.new_cache(1)))

    def _prefill(self) -> None:
        """Compute the next prompts, or the next part of a long one; let their rows join."""
        if not self._state.prefills:
            return
        prefill = self._state.prefills[0]
        tokens = [
            request.prompt[prefill.done : prefill.done + self.limits.prefill_tokens]
            for request in prefill.requests
        ]
        tenants = [request.tenant for request in prefill.requests]
        logits = self._model.forward(tokens, tenants, prefill.cache)
        self.counts.prompt_tokens += sum(map(len, tokens))
        prefill.done += len(tokens[0])
        if prefill.done < len(prefill.requests[0].prompt):
            return
        self._state.prefills.popleft()
        rows, sources = [], []
        for source, request in enumerate(prefill.requests):
            for index in range(request.sampling.n):
                row = self._new_row(request, index)
                if not self._take(row, logits[source]):
                    rows.append(row)
                    sources.append(source)
        if rows:
            self._cache.join(prefill.cache, sources)
            self._state.rows += rows

    def _new_row(self, request: Request, index: int) -> _Row:
        return _Row(
            request=request,
            index=index,
            sampler=Sampler(request.sampling, index, self._model.device),
            text=GrowingText(self._tokenizer, request.sampling.stop),
        )

    def _decode(self) -> None:
        """Compute the next token of every row."""
        rows = self._state.rows
        if not rows:
            return
        tenants = [row.request.tenant for row in rows]
        logits = self._model.forward([(row.next,) for row in rows], tenants, self._cache)
        self.counts.steps += 1
        self.counts.rows += len(rows)
        likeliest = logits.argmax(-1).tolist()
        ended = [
            place
            for place, row in enumerate(rows)
            if self._take(row, logits[place], likeliest[place])
        ]
        self._drop(ended)

    def _drop(self, places: Sequence[int]) -> None:
        if places:
            order = self._cache.drop(places)
            self._state.rows = [self._state.rows[place] for place in order]

    def _take(self, row: _Row, logits: Tensor, likeliest: int | None = None) -> bool:
        """Choose a row's next token and tell of it; return whether the text is at its end."""
        request, sampling = row.request, row.request.sampling
        greedy = row.sampler.greedy and likeliest is not None
        row.next = likeliest if greedy and likeliest is not None else row.sampler.choose(logits)
        row.num_tokens += 1
        self.counts.answer_tokens += 1
        with self._changed:
            self._queue.served(request.tenant, ANSWER_COST)
        at_end = row.next in self._ends and not sampling.ignore_eos
        text = "" if at_end else row.text.add(row.next)
        finish: FinishReason | None = None
        if at_end or row.text.stopped:
            finish = "stop"
        elif row.num_tokens >= sampling.max_tokens:
            finish = "length"
        if finish is not None and not row.text.stopped:
            text += row.text.end()
        explained = row.sampler.explain(logits, row.next)
        piece = Piece(
            index=row.index,
            text=text,
            tokens=(row.next,),
            logprobs=() if explained is None else (explained,),
            finish=finish,
        )
        self._tell(request, piece)
        if finish is not None:
            self._finished(request)
        return finish is not None

    def _finished(self, request: Request) -> None:
        """Count one of a request's texts as ended."""
        request.unfinished -= 1
        if not request.unfinished:
            self._residency.release(request.tenant)

    @staticmethod
    def _tell(request: Request, piece: Piece) -> None:
        if not request.cancelled:
            request.tell(piece)


def _most_tokens(request: Request) -> int:
    return len(request.prompt) + request.sampling.max_tokens


numbers = itertools.count(1)
"""Of tenants' versions, never used twice."""
