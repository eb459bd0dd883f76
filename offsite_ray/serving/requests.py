# SPDX-License-Identifier: Apache-2.0
"""What is asked of the engine, and what it answers: plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from offsite_ray.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FinishReason = Literal["stop", "length", "busy", "error"]
"""A stop string or the end of the text; ``max_tokens``; no place after all; a failed engine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen, in the words of OpenAI's API."""

    max_tokens: int = 16
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 takes all."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    logprobs: int | None = None
    """How many of the likeliest tokens to name beside the one that was chosen."""
    n: int = 1
    """Texts for the same prompt."""
    ignore_eos: bool = False
    echo: bool = False
    """Whether ``logprobs`` are wanted of the prompt's tokens too."""

    def __post_init__(self) -> None:
        """Raise :class:`RequestError` for what cannot be."""
        for name, allowed, words in _BOUNDS:
            value = getattr(self, name)
            if value is not None and not allowed(value):
                raise RequestError(f"{name} is {value!r}; it must be {words}", name)
        if any(not stop for stop in self.stop) or len(self.stop) > _MAX_STOPS:
            raise RequestError(f"stop takes up to {_MAX_STOPS} strings, none of them empty", "stop")


_MAX_STOPS = 4
_BOUNDS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("max_tokens", lambda value: value >= 1, "at least 1"),
    ("temperature", lambda value: value == 0 or 0.01 <= value <= 2, "0, or from 0.01 to 2"),
    ("seed", lambda value: 0 <= value < 2**63, "from 0 to 2**63 - 1"),
    ("top_p", lambda value: 0 < value <= 1, "above 0, up to 1"),
    ("top_k", lambda value: value >= 0, "0 or more"),
    ("logprobs", lambda value: 0 <= value <= 20, "from 0 to 20"),
    ("n", lambda value: 1 <= value <= 16, "from 1 to 16"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """A token that was chosen, and what else was likely."""

    token: int
    logprob: float
    top: Mapping[int, float]
    """Likeliest tokens to their log-probabilities, in falling order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of the answer to a request, as soon as it is known."""

    index: int
    """Which of the ``n`` texts."""
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens but the first, where asked for; in the first piece of each text."""
    finish: FinishReason | None = None
    """Set in the last piece of a text."""
    error: str | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class Request:
    """A prompt for a tenant's model, and who is told of the answer."""

    id: str
    tenant: int
    """Number of the tenant's version."""
    prompt: tuple[int, ...]
    sampling: Sampling
    tell: Callable[[Piece], None]
    """Called from the engine's thread; must return at once."""
    cancelled: bool = False
    begun: bool = False
    """Whether it was let in."""
    unfinished: int = field(default=0)
    """Of its texts, those that are not at their end."""
    num_tokens: int = 0
    """Of all its texts together, so far."""

    @property
    def explains_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt's tokens are wanted."""
        return self.sampling.echo and self.sampling.logprobs is not None

    def told(self, piece: Piece) -> None:
        """Tell of a piece, unless nobody waits for it any more."""
        if not self.cancelled:
            self.tell(piece)
