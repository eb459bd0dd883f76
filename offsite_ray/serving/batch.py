# SPDX-License-Identifier: Apache-2.0
"""The texts that are being written: prompts are computed, then a token of every text at a time.

Nothing here knows of threads or of who waits; the engine's thread owns it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offsite_ray.serving.requests import Piece
from offsite_ray.serving.sampling import Sampler, explain
from offsite_ray.serving.text import GrowingText

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from offsite_ray.serving.cache import WindowCache
    from offsite_ray.serving.model import BatchModel
    from offsite_ray.serving.requests import FinishReason, Request, TokenLogprob


@dataclass(kw_only=True, slots=True)
class Counts:
    """What was done since the start; read by anybody, written by the engine's thread."""

    steps: int = 0
    """Decoding steps."""
    rows: int = 0
    """Rows of all decoding steps; over ``steps``, how full the batch was."""


@dataclass(kw_only=True, slots=True)
class _Row:
    """A text that is being written."""

    request: Request
    index: int
    sampler: Sampler
    text: GrowingText
    last: int = 0
    """Its last token, which the model has not seen yet."""
    num_tokens: int = 0


@dataclass(kw_only=True, slots=True)
class _Prefill:
    """Prompts that are computed together; a long one by itself, part by part."""

    requests: list[Request]
    cache: WindowCache
    done: int = 0
    """Tokens of the prompt that are computed already, of one by itself."""
    explained: dict[Request, list[TokenLogprob]] = field(default_factory=dict)
    """Log-probabilities of the prompt's tokens, of requests that want them."""


class Batch:
    """Rows of several tenants, and the prompts whose rows are about to join."""

    def __init__(
        self,
        model: BatchModel,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: Collection[int],
        prefill_tokens: int,
        ended: Callable[[Request], None],
    ) -> None:
        """Hold nothing.

        Args:
            model: With the tenants' blocks routed.
            tokenizer: Of the model.
            end_tokens: Tokens that end a text.
            prefill_tokens: Prompt tokens that are computed at a time.
            ended: Told of each request whose last text is at its end.
        """
        self._model, self._tokenizer = model, tokenizer
        self._end_tokens, self._prefill_tokens = frozenset(end_tokens), prefill_tokens
        self._ended = ended
        self.counts = Counts()
        self.clear()

    def clear(self) -> None:
        """Forget every text."""
        self._rows: list[_Row] = []
        self._prefills: deque[_Prefill] = deque()
        self._cache = self._model.new_cache()

    @property
    def requests(self) -> list[Request]:
        """Everybody whose texts are here, each once."""
        ahead = tuple(self._prefills)
        prefilled = [request for prefill in ahead for request in prefill.requests]
        return list(dict.fromkeys([*(row.request for row in self._rows), *prefilled]))

    @property
    def num_rows(self) -> int:
        """Texts that are written, or will be as soon as their prompt is computed."""
        # A copy, since others ask than the engine's thread.
        ahead = (r.sampling.n for prefill in tuple(self._prefills) for r in prefill.requests)
        return len(self._rows) + sum(ahead)

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values are held for the texts that are written, with padding."""
        return self._cache.num_rows * self._cache.window.width

    def add(self, request: Request) -> None:
        """Take a request in: beside others that fit into one forward, or by itself."""
        if self._prefills and not self._prefills[-1].done:
            last = self._prefills[-1]
            longest = max(len(other.prompt) for other in [*last.requests, request])
            if longest * (len(last.requests) + 1) <= self._prefill_tokens:
                last.requests.append(request)
                last.cache = self._model.new_cache(len(last.requests))
                return
        self._prefills.append(_Prefill(requests=[request], cache=self._model.new_cache(1)))

    def drop_cancelled(self) -> None:
        """Free what requests have that nobody waits for any more."""
        gone = [place for place, row in enumerate(self._rows) if row.request.cancelled]
        for place in gone:
            self._end_text(self._rows[place].request)
        self._drop(gone)
        for prefill in list(self._prefills):
            if all(request.cancelled for request in prefill.requests):
                self._prefills.remove(prefill)
                for request in prefill.requests:
                    self._ended(request)

    def prefill(self) -> None:
        """Compute the next prompts, or the next part of a long one; their rows join at the end."""
        if not self._prefills:
            return
        prefill, size = self._prefills[0], self._prefill_tokens
        tokens = [r.prompt[prefill.done : prefill.done + size] for r in prefill.requests]
        tenants = [request.tenant for request in prefill.requests]
        every = any(request.explains_prompt for request in prefill.requests)
        logits = self._model.forward(tokens, tenants, prefill.cache, every=every)
        if every:
            _explain(prefill, tokens, logits)
        prefill.done += len(tokens[0])
        if prefill.done < len(prefill.requests[0].prompt):
            return
        for request, explained in prefill.explained.items():
            for index in range(request.sampling.n):
                request.told(Piece(index=index, text="", prompt_logprobs=tuple(explained)))
        joining = [
            (source, row)
            for source, request in enumerate(prefill.requests)
            for row in self._new_rows(request)
            if not self._take(row, logits[source, -1])
        ]
        if joining:
            self._cache.join(prefill.cache, [source for source, _ in joining])
            self._rows += [row for _, row in joining]
        # Only now: whatever fails before, everybody is still known here, and told.
        self._prefills.popleft()

    def decode(self) -> None:
        """Compute the next token of every row; those at their end leave."""
        if not self._rows:
            return
        tenants = [row.request.tenant for row in self._rows]
        new = [(row.last,) for row in self._rows]
        logits = self._model.forward(new, tenants, self._cache)[:, -1]
        self.counts.steps += 1
        self.counts.rows += len(self._rows)
        likeliest = logits.argmax(-1).tolist()
        ended = [
            place
            for place, row in enumerate(self._rows)
            if self._take(row, logits[place], likeliest[place])
        ]
        self._drop(ended)

    def _new_rows(self, request: Request) -> list[_Row]:
        sampling = request.sampling
        return [
            _Row(
                request=request,
                index=index,
                sampler=Sampler(sampling, index, self._model.device),
                text=GrowingText(self._tokenizer, sampling.stop, request.prompt),
            )
            for index in range(sampling.n)
        ]

    def _drop(self, places: Sequence[int]) -> None:
        if places:
            order = self._cache.drop(places)
            self._rows = [self._rows[place] for place in order]

    def _take(self, row: _Row, logits: Tensor, likeliest: int | None = None) -> bool:
        """Choose a row's next token and tell of it; return whether the text is at its end.

        Args:
            row: The text.
            logits: ``(V,)``, behind its last token.
            likeliest: The token with the largest, where somebody knows it already.
        """
        sampler, sampling = row.sampler, row.request.sampling
        known = likeliest is not None and sampler.greedy
        try:
            row.last = likeliest if known and likeliest is not None else sampler.choose(logits)
        except RuntimeError as error:  # the logits are no numbers: nobody else's matter
            row.request.told(Piece(index=row.index, text="", finish="error", error=str(error)))
            self._end_text(row.request)
            return True
        row.num_tokens += 1
        row.request.num_tokens += 1
        at_end = row.last in self._end_tokens and not sampling.ignore_eos
        text = "" if at_end else row.text.add(row.last)
        finish: FinishReason | None = None
        if at_end or row.text.stopped:
            finish = "stop"
        elif row.num_tokens >= sampling.max_tokens:
            finish = "length"
        if finish is not None and not row.text.stopped:
            text += row.text.end()
        explained = sampler.explain(logits, row.last)
        row.request.told(
            Piece(
                index=row.index,
                text=text,
                tokens=(row.last,),
                logprobs=() if explained is None else (explained,),
                finish=finish,
            )
        )
        if finish is not None:
            self._end_text(row.request)
        return finish is not None

    def _end_text(self, request: Request) -> None:
        """Count one of a request's texts as ended."""
        request.unfinished -= 1
        if not request.unfinished:
            self._ended(request)


def _explain(prefill: _Prefill, tokens: Sequence[Sequence[int]], logits: Tensor) -> None:
    """Note how likely the prompts' tokens were, of those requests that want to know.

    Args:
        prefill: The prompts.
        tokens: The part of each that was computed, all of which end together.
        logits: ``(B, T, V)``, behind each token.
    """
    for place, request in enumerate(prefill.requests):
        if request.explains_prompt:
            ahead = request.prompt[prefill.done + 1 : prefill.done + 1 + len(tokens[place])]
            start = logits.shape[1] - len(tokens[place])
            behind = logits[place, start : start + len(ahead)]
            found = explain(behind, ahead, request.sampling.logprobs or 0)
            prefill.explained.setdefault(request, []).extend(found)
