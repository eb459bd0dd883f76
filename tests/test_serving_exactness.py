# SPDX-License-Identifier: Apache-2.0
"""Whatever shares a batch, every tenant's answer is that of its own plugged-in model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel

from offsite_ray.architectures import load_model
from offsite_ray.config import Limits
from offsite_ray.emulator import open_full_model
from offsite_ray.errors import FamilyError
from offsite_ray.serving.start import start_engine
from tests.adapters import METHODS
from tests.served import PROMPTS, Answer, Tenants, ask, generated, held, make_tenants, serve
from tests.tiny_models import save_tiny

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from offsite_ray.serving.batch import Counts
    from offsite_ray.serving.requests import TokenLogprob

SIX = ("gpt2", "opt", "bloom", "llama", "qwen3", "gemma3_text")
WITH_BIASES = ("gpt2", "opt", "bloom")
NUM_TOKENS = 12
LIMITS = Limits(max_rows=6, max_queue=64, cache_tokens=4096, prefill_tokens=16)


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """What one engine answered to every tenant at once, and each tenant's model as stock has it."""

    answers: dict[tuple[str, tuple[int, ...]], Answer]
    models: dict[str, PreTrainedModel]
    counts: Counts


def answered(tenants: Tenants) -> Mixed:
    """Ask everything of every tenant, and of the full model, in batches of all of them."""
    engine, numbers = serve(tenants, LIMITS)
    wish: dict[str, Any] = {
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "echo": True,
        "logprobs": 3,
    }
    try:
        with held(engine):
            answers = {
                (name, prompt): ask(engine, number, prompt, **wish)
                for prompt in PROMPTS
                for name, number in numbers.items()
            }
        for key, answer in answers.items():
            assert answer.done.wait(60), key
    finally:
        engine.stop()
    directories = {"base": tenants.full, **tenants.plugged_in}
    models = {name: load_model(path) for name, path in directories.items()}
    return Mixed(answers=answers, models=models, counts=engine.counts)


@pytest.fixture(scope="module", params=SIX)
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    family = request.param
    methods = [m for m in METHODS if m != "bitfit" or family in WITH_BIASES]
    # Further away, stock itself is off by 1e-5 in float32.
    return answered(make_tenants(family, tmp_path_factory.mktemp(family), methods, noise=0.1))


def test_tokens_are_those_of_stock_generate(mixed: Mixed) -> None:
    wrong_tenant = 0
    for (name, prompt), answer in mixed.answers.items():
        expected = generated(mixed.models[name], prompt, NUM_TOKENS)
        assert answer.tokens() == expected, (name, prompt)
        if name != "base":
            wrong_tenant += answer.tokens() == mixed.answers["base", prompt].tokens()
    # what would be equal with another tenant's weights shows nothing
    assert wrong_tenant < len(mixed.models)
    assert mixed.counts.rows > 2 * mixed.counts.steps


def test_log_probabilities_are_those_of_a_stock_forward(mixed: Mixed) -> None:
    for (name, prompt), answer in mixed.answers.items():
        tokens = [*prompt, *answer.tokens()]
        with torch.no_grad():
            logits = mixed.models[name](torch.tensor([tokens])).logits[0].float()
        expected = torch.log_softmax(logits, -1)
        first, *others = answer.pieces
        of_prompt = first.prompt_logprobs
        of_answer = [piece.logprobs[0] for piece in others]
        assert [one.token for one in (*of_prompt, *of_answer)] == tokens[1:], (name, prompt)
        check_close(expected, [*of_prompt, *of_answer])


def check_close(expected: Tensor, found: Sequence[TokenLogprob]) -> None:
    """Compare log-probabilities, also of the likeliest tokens.

    Args:
        expected: ``(T, V)``, behind each token.
        found: Of the tokens that follow them.
    """
    for row, one in zip(expected, found, strict=False):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-5)
        assert [*one.top.values()] == pytest.approx(row.topk(len(one.top))[0].tolist(), abs=1e-5)


def near_ties(family: str, directory: Path, gap: float) -> Path:
    """Write a model in float64 whose every likeliest token has a twin, at about the same logit."""
    save_tiny(family, directory, dtype=torch.float64, tie_word_embeddings=False)
    model = load_model(directory)
    head = model.get_output_embeddings().weight.data
    half = len(head) // 2
    noise = torch.randn(half, 1, generator=torch.Generator().manual_seed(1), dtype=head.dtype)
    head[half:] = head[:half] * (1 + gap * noise)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", [family for family in SIX if family != "bloom"])
def test_near_ties_are_decided_in_float64_as_stock_does(family: str, tmp_path: Path) -> None:
    # Float32 cannot tell such twins from each other; the rounding of what float64 computes can.
    full = near_ties(family, tmp_path / "full", 1e-6)
    tenants = make_tenants(family, tmp_path, ("full", "lora"), full=full)
    mixed = answered(tenants)
    # The plugged-in model has LoRA's product rounded to float32, more than what decides here.
    unmerged: Any = PeftModel.from_pretrained(load_model(full), tenants.adapters["lora"])
    mixed.models["lora"] = unmerged.to(torch.float64)
    twins = 0
    for (name, prompt), answer in mixed.answers.items():
        expected = generated(mixed.models[name], prompt, NUM_TOKENS)
        assert answer.tokens() == expected, (name, prompt)
        twins += sum(token >= 64 for token in expected)
    assert 0 < twins < NUM_TOKENS * len(mixed.answers)


def test_bloom_is_refused_in_float64(tmp_path: Path) -> None:
    # It rounds scores to float32, where what masks padding is infinite and its softmax no number.
    full = open_full_model(save_tiny("bloom", tmp_path, dtype=torch.float64))
    with pytest.raises(FamilyError, match="bloom computes something else in a batch"):
        start_engine(full, LIMITS)
