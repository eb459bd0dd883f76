# SPDX-License-Identifier: Apache-2.0
"""Whatever shares a batch, every tenant's answer is that of its own plugged-in model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from offsite_ray.config import Limits
from tests.adapters import METHODS
from tests.served import PROMPTS, ask, generated, held, make_tenants, serve

if TYPE_CHECKING:
    from pathlib import Path

SIX = ("gpt2", "opt", "bloom", "llama", "qwen3", "gemma3_text")
WITH_BIASES = ("gpt2", "opt", "bloom")


@pytest.mark.parametrize("family", SIX)
def test_mixed_batches_are_exact(family: str, tmp_path: Path) -> None:
    methods = [m for m in METHODS if m != "bitfit" or family in WITH_BIASES]
    tenants = make_tenants(family, tmp_path, methods)
    engine, numbers = serve(
        tenants, Limits(max_rows=6, max_queue=64, cache_tokens=4096, prefill_tokens=16)
    )
    with held(engine):
        answers = {
            (name, prompt): ask(engine, number, prompt, max_tokens=12, ignore_eos=True)
            for prompt in PROMPTS
            for name, number in numbers.items()
        }
    directories = {"base": tenants.full, **tenants.plugged_in}
    wrong_tenant = 0
    for (name, prompt), answer in answers.items():
        assert answer.done.wait(60), (name, prompt)
        expected = generated(directories[name], prompt, 12)
        assert answer.tokens() == expected, (name, prompt)
        if name != "base":
            wrong_tenant += answer.tokens() == answers["base", prompt].tokens()
    # what would be equal with another tenant's weights shows nothing
    assert wrong_tenant <= len(methods)
    assert engine.counts.rows > 2 * engine.counts.steps
    engine.stop()
