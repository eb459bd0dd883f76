# SPDX-License-Identifier: Apache-2.0
"""Ways to answer the same requests, each in a process of its own: memory and time.

    python -m benchmarks.serve_engine WAY FOLDER

The folder has a full model, and for each fine-tuning method an adapter bundle and the plugged-in
model. The tenants of a way have the tensors of that bundle with noise, each its own.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.architectures import load_model
from offsite_ray.config import Limits
from offsite_ray.emulator import open_full_model
from offsite_ray.serving.own import Net, Own, Pair
from offsite_ray.serving.requests import Piece, Request, Sampling
from offsite_ray.serving.start import start_engine
from offsite_ray.serving.tenants import read_own

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offsite_ray.serving.engine import Engine

NUM_TENANTS = 16
PROMPT_TOKENS = 64
ANSWER_TOKENS = 64
ROUNDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a way took."""

    way: str
    loaded_bytes: int
    """Resident once the models are loaded and have answered."""
    peak_bytes: int
    seconds: list[float]
    """Of each round: all requests, from the first that is sent to the last that is answered."""
    tokens: int
    """Of the answers of a round."""
    own_bytes: int
    """Of a tenant's own tensors; 0 where there are none."""
    model_bytes: int


def prompts() -> list[tuple[int, ...]]:
    """Return a prompt for each tenant."""
    draw = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randint(0, 50_000, (PROMPT_TOKENS,), generator=draw).tolist())
        for _ in range(NUM_TENANTS)
    ]


def an_engine(folder: Path, method: str | None, num_tenants: int) -> tuple[Engine, int]:
    """Return an engine with tenants 1 to ``num_tenants``, and the bytes of one of them."""
    full = open_full_model(folder / "full")
    limits = Limits(
        max_rows=NUM_TENANTS, max_queue=NUM_TENANTS, prefill_tokens=NUM_TENANTS * PROMPT_TOKENS
    )
    engine = start_engine(full, limits)
    if method is None:
        return engine, 0
    own = read_own(folder / f"adapter-{method}", full)
    for number in range(1, num_tenants + 1):
        engine.residency.add(number, noisy(own, number))
    return engine, own.nbytes


def noisy(own: Own, seed: int) -> Own:
    """Return tensors near others, in memory of their own."""
    draw = torch.Generator().manual_seed(seed)

    def near(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.01 * torch.randn(tensor.shape, generator=draw)

    def part(given: Pair | Net) -> Any:
        return type(given)(**{name: near(getattr(given, name)) for name in given.__slots__})

    return Own(
        weights={n: {p: near(t) for p, t in m.items()} for n, m in own.weights.items()},
        biases={name: near(tensor) for name, tensor in own.biases.items()},
        pairs={name: part(pair) for name, pair in own.pairs.items()},
        nets={name: part(net) for name, net in own.nets.items()},
    )


def answered(engine: Engine, asked: Sequence[tuple[int, tuple[int, ...]]]) -> None:
    """Have requests answered, all sent at once."""
    left, done = [len(asked)], threading.Event()

    def tell(piece: Piece) -> None:
        assert piece.finish != "error", piece.error
        if piece.finish is not None:
            left[0] -= 1
            if not left[0]:
                done.set()

    sampling = Sampling(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    for place, (tenant, prompt) in enumerate(asked):
        engine.submit(
            Request(id=str(place), tenant=tenant, prompt=prompt, sampling=sampling, tell=tell)
        )
    assert done.wait(600)


def _together(method: str | None, num_tenants: int) -> Callable[[Path], tuple[Any, int]]:
    """All requests at once: of as many tenants, or all of one."""

    def prepare(folder: Path) -> tuple[Any, int]:
        engine, own = an_engine(folder, method, num_tenants)
        tenants = [n % num_tenants + 1 if method else 0 for n in range(NUM_TENANTS)]
        asked = list(zip(tenants, prompts(), strict=True))
        return lambda: answered(engine, asked), own

    return prepare


def _one_by_one(method: str) -> Callable[[Path], tuple[Any, int]]:
    """The same requests, tenant by tenant."""

    def prepare(folder: Path) -> tuple[Any, int]:
        engine, own = an_engine(folder, method, NUM_TENANTS)

        def work() -> None:
            for number, prompt in enumerate(prompts(), 1):
                answered(engine, [(number, prompt)])

        return work, own

    return prepare


@torch.inference_mode()
def _generate(model: Any, prompt: Sequence[int]) -> None:
    tokens = torch.tensor([list(prompt)])
    model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0,
        eos_token_id=None, min_new_tokens=ANSWER_TOKENS, max_new_tokens=ANSWER_TOKENS,
    )  # fmt: skip


def _stock(folder: Path) -> tuple[Any, int]:
    """``generate`` of the plugged-in model, one request at a time."""
    model = load_model(folder / "plugged-full")
    return lambda: [_generate(model, prompt) for prompt in prompts()], 0


def _copies(folder: Path) -> tuple[Any, int]:
    """A plugged-in copy for each tenant, each answering its own request."""
    models = [load_model(folder / "plugged-full") for _ in range(NUM_TENANTS)]
    # What is mapped from one file is one memory; real copies are files of their own.
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    asked = list(zip(models, prompts(), strict=True))
    return lambda: [_generate(model, prompt) for model, prompt in asked], 0


def _transformers(folder: Path) -> tuple[Any, int]:
    """The plugged-in model by the continuous batching that transformers has."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model: Any = load_model(folder / "plugged-full")
    wish = GenerationConfig(
        do_sample=False, max_new_tokens=ANSWER_TOKENS, eos_token_id=-1, pad_token_id=0
    )
    room = ContinuousBatchingConfig(
        num_blocks=256, page_size=16, max_batch_tokens=NUM_TENANTS * PROMPT_TOKENS
    )
    manager = model.init_continuous_batching(
        generation_config=wish, continuous_batching_config=room
    )
    manager.start()

    def work() -> None:
        for prompt in prompts():
            manager.add_request(list(prompt), max_new_tokens=ANSWER_TOKENS, eos_token_id=-1)
        ended = 0
        while ended < NUM_TENANTS:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                assert len(result.generated_tokens) == ANSWER_TOKENS, result.error
                ended += 1

    return work, 0


WAYS: dict[str, Callable[[Path], tuple[Any, int]]] = {
    "full model alone": _together(None, 1),
    "16 tenants, full, together": _together("full", NUM_TENANTS),
    "16 tenants, full, one by one": _one_by_one("full"),
    "16 plugged-in copies": _copies,
    "16 tenants, lora, together": _together("lora", NUM_TENANTS),
    "16 tenants, lora, one by one": _one_by_one("lora"),
    "1 tenant, lora": _together("lora", 1),
    "1 tenant, full": _together("full", 1),
    "generate, one at a time": _stock,
    "transformers' continuous batching": _transformers,
}

CLOSE = (
    "1 tenant, lora",
    "16 tenants, lora, together",
    "1 tenant, full",
    "transformers' continuous batching",
)
"""Ways whose difference is not far above this machine's noise."""


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(way: str, folder: Path) -> Measured:
    """Prepare a way, let it answer once, and then time it."""
    work, own = WAYS[way](folder)
    work()
    loaded = resident()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    weights = sum(f.stat().st_size for f in (folder / "full").glob("*.safetensors"))
    return Measured(
        way=way,
        loaded_bytes=loaded,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        seconds=seconds,
        tokens=NUM_TENANTS * ANSWER_TOKENS,
        own_bytes=own,
        model_bytes=weights,
    )


def speed(found: Measured) -> float:
    """Return the tokens of answers in a second, of the median round."""
    return found.tokens / statistics.median(found.seconds)


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1], Path(sys.argv[2])))))
    # Threads of engines and of transformers would be waited for.
    sys.stdout.flush()
    os._exit(0)
