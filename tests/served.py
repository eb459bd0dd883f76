# SPDX-License-Identifier: Apache-2.0
"""Tenants of a tiny full model: adapter bundles, an engine, and their plugged-in models."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from offsite_ray.architectures import load_model
from offsite_ray.config import CompressConfig, Limits, PlugInConfig
from offsite_ray.emulator import compress, open_full_model
from offsite_ray.plug_in import plug_in
from offsite_ray.serving.requests import Piece, Request, Sampling
from offsite_ray.serving.routing import BASE
from offsite_ray.serving.start import start_engine
from offsite_ray.serving.tenants import read_own
from tests.adapters import METHODS, make_adapter
from tests.tiny_models import save_tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

    from offsite_ray.serving.engine import Engine

PROMPTS = ((5, 9, 60), (7,), tuple(range(3, 24)), (90, 14, 33, 2, 8, 71, 30))
"""Prompts of several lengths, the longest longer than a sliding window."""


@dataclass(kw_only=True)
class Answer:
    """What an engine tells of a request, put together."""

    request: Request | None = None
    done: threading.Event = field(default_factory=threading.Event)
    pieces: list[Piece] = field(default_factory=list)
    finished_at: float = 0.0

    def tokens(self, index: int = 0) -> list[int]:
        return [token for piece in self.of(index) for token in piece.tokens]

    def text(self, index: int = 0) -> str:
        return "".join(piece.text for piece in self.of(index))

    def of(self, index: int) -> list[Piece]:
        return [piece for piece in self.pieces if piece.index == index]

    def finish(self, index: int = 0) -> str | None:
        return self.of(index)[-1].finish


@dataclass(frozen=True, kw_only=True)
class Tenants:
    """A full model, an adapter bundle for each fine-tuning method that it can have."""

    full: Path
    adapters: dict[str, Path]
    plugged_in: dict[str, Path]


def make_tenants(
    family: str,
    root: Path,
    methods: Sequence[str] = METHODS,
    *,
    full: Path | None = None,
    noise: float = 0.3,
) -> Tenants:
    """Write adapters far from a tiny model, one a method, and its plugged-in models.

    Args:
        family: Of the model.
        root: Directory to write to.
        methods: Fine-tuning methods.
        full: The model; by default one is written too.
        noise: How far, as a standard deviation.
    """
    # With tied embeddings a random model repeats its last token, whoever computes it.
    full = full or save_tiny(family, root / "full", tie_word_embeddings=False)
    plans = {"full": "1-4-1", "lora": "2-3-1", "bottleneck": "1-4-1", "bitfit": "adapter=0,3,5"}
    adapters, plugged = {}, {}
    for method in methods:
        plan = plans[method]
        plan = f"{plan} emulator=1,2,4" if "=" in plan else plan
        bundle = root / f"bundle-{method}"
        compress(CompressConfig(model=str(full), plan=plan, out=str(bundle)))
        adapters[method] = root / f"adapter-{method}"
        make_adapter(bundle, adapters[method], method=method, noise=noise)
        plugged[method] = root / f"plugged-{method}"
        plug_in(
            PlugInConfig(model=str(full), adapter=str(adapters[method]), out=str(plugged[method]))
        )
    return Tenants(full=full, adapters=adapters, plugged_in=plugged)


def serve(
    tenants: Tenants, limits: Limits | None = None, **given: object
) -> tuple[Engine, dict[str, int]]:
    """Return a running engine, and the number of each tenant (that of the full model is "base")."""
    full = open_full_model(tenants.full)
    engine = start_engine(full, limits or Limits(cache_tokens=4096, max_queue=64), **given)  # type: ignore[arg-type]
    numbers = {"base": BASE}
    for number, (name, path) in enumerate(tenants.adapters.items(), 1):
        engine.residency.add(number, read_own(path, full))
        numbers[name] = number
    return engine, numbers


def ask(
    engine: Engine,
    tenant: int,
    prompt: Sequence[int],
    *,
    at_piece: Callable[[], object] = lambda: None,
    **sampling: object,
) -> Answer:
    """Send a request; return what its answer is collected in.

    Args:
        engine: Which is to answer.
        tenant: Number of the tenant.
        prompt: Tokens.
        at_piece: Called by the engine's thread with every piece.
        **sampling: Fields of :class:`Sampling`; greedy, unless said otherwise.
    """
    answer = Answer()
    ended: set[int] = set()
    n = int(sampling.get("n", 1))  # type: ignore[call-overload]

    def tell(piece: Piece) -> None:
        answer.pieces.append(piece)
        if piece.finish is not None:
            ended.add(piece.index)
        if len(ended) == n:
            answer.finished_at = time.monotonic()
            answer.done.set()
        at_piece()

    request = Request(
        id="request",
        tenant=tenant,
        prompt=tuple(prompt),
        sampling=Sampling(**{"temperature": 0.0, **sampling}),  # type: ignore[arg-type]
        tell=tell,
    )
    answer.request = request
    engine.submit(request)
    return answer


@contextlib.contextmanager
def held(engine: Engine) -> Iterator[None]:
    """Keep an engine from doing anything, so that what is sent meanwhile is there at once."""
    at_rest, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        at_rest.set()
        go_on.wait(30)

    engine.do(hold)
    assert at_rest.wait(30)
    try:
        yield
    finally:
        go_on.set()


@torch.no_grad()
def generated(model: Path | PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Return what stock ``generate`` makes of a prompt, greedily, with a model or its directory."""
    if isinstance(model, Path):
        model = load_model(model)
    tokens = torch.tensor([list(prompt)])
    ids = model.generate(  # type: ignore[operator]
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    found: list[int] = ids[0, len(prompt) :].tolist()
    return found
