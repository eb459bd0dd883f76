# SPDX-License-Identifier: Apache-2.0
"""Continuous batching over tenants: requests join and leave between decoding steps.

One thread owns the model. A step of it lets requests in, computes one prefill, and then one token
of every row. What other threads do (submit, cancel, add a tenant) waits for the end of a step at
most.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from offsite_ray.errors import BusyError, RequestError
from offsite_ray.serving.batch import Batch, Counts
from offsite_ray.serving.queue import ANSWER_COST, PROMPT_COST, FairQueue
from offsite_ray.serving.requests import Piece

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transformers import PreTrainedTokenizerBase

    from offsite_ray.config import Limits
    from offsite_ray.serving.model import BatchModel
    from offsite_ray.serving.requests import Request
    from offsite_ray.serving.residency import Residency

_LOG = logging.getLogger(__name__)

_BUSY = "all places are taken; ask again in a moment"
_MAX_FAILED_STEPS = 3
"""In a row, after which it is the engine that is broken, not a request."""
_PAUSE_S = 0.005
_IDLE_S = 1.0
"""How often a thread without work says that it lives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What a model can take."""

    vocab_size: int
    """Token ids are below it."""
    max_positions: int
    """Tokens that a prompt and its answer may have together."""
    end_tokens: frozenset[int]
    """Tokens that end a text."""


class Engine:
    """Answers requests to many tenants' models, which share one trunk."""

    def __init__(
        self,
        model: BatchModel,
        tokenizer: PreTrainedTokenizerBase,
        residency: Residency,
        bounds: Bounds,
        limits: Limits,
    ) -> None:
        """Take a model; nothing runs before :meth:`start`.

        Args:
            model: With the tenants' blocks routed.
            tokenizer: Of the model.
            residency: Knows the tenants, and which of them are in the model.
            bounds: What the model can take.
            limits: What is taken on at once.
        """
        self.residency, self.bounds, self.limits = residency, bounds, limits
        self._queue = FairQueue()
        self._batch = Batch(model, tokenizer, bounds.end_tokens, limits.prefill_tokens, self._ended)
        self._changed = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._beat = time.monotonic()
        self._failed_steps = 0

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Take nothing more, and end after the step at hand; who is not answered is told."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def is_healthy(self, patience_s: float = 60.0) -> bool:
        """Return whether the thread is at work, or has none to do.

        Args:
            patience_s: The longest that a step may take.
        """
        alive = self._thread.is_alive() and time.monotonic() - self._beat < patience_s
        return alive and self._failed_steps < _MAX_FAILED_STEPS

    @property
    def counts(self) -> Counts:
        """What was done since the start."""
        return self._batch.counts

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return self._batch.cache_tokens

    @property
    def num_running(self) -> int:
        """Texts that are being written or prepared."""
        return self._batch.num_rows

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
        check(request, self.bounds, self.limits)
        request.unfinished = request.sampling.n
        with self._changed:
            if self._stopping:
                raise BusyError("the service has ended; ask again")
            displaced = None
            free = max(0, self.limits.max_rows - self.num_running)
            may_wait = self._queue.may_wait(request.tenant)
            if len(self._queue) >= free + (self.limits.max_queue if may_wait else 0):
                displaced = self._queue.displaced_by(request.tenant) if may_wait else None
                self._queue.refuse(displaced.tenant if displaced else request.tenant)
                if displaced is None:
                    raise BusyError(_BUSY)
            self.residency.hold(request.tenant)
            self._queue.put(request)
            if displaced is not None:
                self._queue.take(displaced)
                self._commands.append(lambda: self._turn_away(displaced))
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

    # All of it: what the cache holds was made in this mode, and is changed in it alone.
    @torch.inference_mode()
    def _run(self) -> None:
        while not self._stopping:
            with self._changed:
                self._changed.wait_for(self._has_work, timeout=_IDLE_S)
            self._beat = time.monotonic()
            self._step()
            with self._changed:
                if len(self._queue) and not self._batch.num_rows:
                    # Somebody waits for a tenant on its way, and nobody else is served.
                    self._changed.wait(_PAUSE_S)
        left = [request for request in self._batch.requests if request.unfinished]
        self._fail([*left, *self._queue], "the service has ended")

    def _has_work(self) -> bool:
        return bool(
            self._stopping or self._commands or self._batch.num_rows or self._may_be_let_in()
        )

    def _may_be_let_in(self) -> bool:
        """Return whether somebody waits who does not wait for a tenant on its way."""
        return any(
            request.cancelled or self.residency.may_be_here(request.tenant)
            for request in self._queue.in_turn()
        )

    def _step(self) -> None:
        """Obey, let in, compute a prefill and then a token of every row."""
        with self._changed:
            commands, self._commands = self._commands, deque()
        for command in commands:
            try:
                command()
            except Exception:
                _LOG.exception("something that the engine was told to do failed")
        try:
            self._batch.drop_cancelled()
            self._let_in()
            works = self._batch.num_rows > 0
            self._batch.prefill()
            self._batch.decode()
            if works:  # a step without work says nothing of the model
                self._failed_steps = 0
        except Exception:
            # Whatever it was, the thread goes on: those whose rows were computed are told.
            _LOG.exception("a step of the engine failed")
            self._failed_steps += 1
            requests = [request for request in self._batch.requests if request.unfinished]
            self._batch.clear()
            self._fail(requests, "the model failed; ask again")
        with self._changed:
            self._changed.notify_all()

    def _let_in(self) -> None:
        """Let in those whose turn it is, as long as there is room for all that they may need."""
        with self._changed:
            for gone in [request for request in self._queue if request.cancelled]:
                self._queue.take(gone)
                self.residency.release(gone.tenant)
            lost = [r for r in self._queue if self.residency.trouble(r.tenant) is not None]
            for one in lost:
                self._queue.take(one)
            self._fail(lost, "the model could not be brought into memory; ask again")
            longest = max(map(_most_tokens, self._batch.requests), default=0)
            while (request := self._next()) is not None:
                rows = self._batch.num_rows + request.sampling.n
                longest = max(longest, _most_tokens(request))
                if rows > self.limits.max_rows or rows * longest > self.limits.cache_tokens:
                    return
                self._queue.take(request)
                self.residency.begin(request.tenant)
                request.begun = True
                answer = request.sampling.n * request.sampling.max_tokens
                cost = PROMPT_COST * len(request.prompt) + ANSWER_COST * answer
                self._queue.served(request.tenant, cost)
                self._batch.add(request)

    def _next(self) -> Request | None:
        """Return whose turn it is, of those whose tenant is in the model.

        Who waits for room in it keeps back those behind, or they might never leave any.
        """
        for request in self._queue.in_turn():
            where = self.residency.where(request.tenant, self.do)
            if where == "here":
                return request
            if where == "full":
                return None
        return None

    def _turn_away(self, request: Request) -> None:
        """Tell a request that its place is somebody else's now."""
        self.residency.release(request.tenant)
        for index in range(request.sampling.n):
            request.told(Piece(index=index, text="", finish="busy", error=_BUSY))

    def _fail(self, requests: Iterable[Request], why: str) -> None:
        for request in requests:
            for index in range(request.sampling.n):
                request.told(Piece(index=index, text="", finish="error", error=why))
            self._ended(request)

    def _ended(self, request: Request) -> None:
        """Count a request as answered; what it was let in for and did not take is given back."""
        with self._changed:
            if request.begun:
                unused = request.sampling.n * request.sampling.max_tokens - request.num_tokens
                self._queue.served(request.tenant, -ANSWER_COST * unused)
        self.residency.release(request.tenant, begun=request.begun)


def check(request: Request, bounds: Bounds, limits: Limits) -> None:
    """Refuse a request that cannot be answered, or that would harm others.

    Raises:
        RequestError: It has no token, an unknown one, or too many.
    """
    prompt, sampling = request.prompt, request.sampling
    if not prompt:
        raise RequestError("the prompt has no token; give at least one", "prompt")
    for name, value, most in (
        ("prompt", len(prompt), limits.max_prompt),
        ("max_tokens", sampling.max_tokens, limits.max_output),
        ("n", sampling.n, limits.max_rows),
    ):
        if value > most:
            raise RequestError(f"{name} takes {value}; up to {most} are allowed", name)
    if not all(0 <= token < bounds.vocab_size for token in prompt):
        raise RequestError(
            f"the prompt has a token that is not below {bounds.vocab_size}, the size of the "
            "vocabulary",
            "prompt",
        )
    most = min(bounds.max_positions, limits.cache_tokens // sampling.n)
    if len(prompt) >= most:
        raise RequestError(
            f"a prompt of {len(prompt)} tokens leaves no room for an answer in the {most} tokens "
            "that fit; shorten the prompt, or lower n",
            "prompt",
        )
    if _most_tokens(request) > most:
        raise RequestError(
            f"a prompt of {len(prompt)} tokens and max_tokens of {sampling.max_tokens} are more "
            f"than the {most} that fit; shorten the prompt, or lower max_tokens or n",
            "max_tokens",
        )


def _most_tokens(request: Request) -> int:
    return len(request.prompt) + request.sampling.max_tokens
