# SPDX-License-Identifier: Apache-2.0
"""What cannot be computed in batches of several tenants is refused before it takes a request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP

from offsite_ray.config import Limits
from offsite_ray.emulator import open_full_model
from offsite_ray.errors import FamilyError
from offsite_ray.serving.start import start_engine
from tests.tiny_models import FAMILIES, save_tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Patch = pytest.MonkeyPatch


def start(family: str, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Start an engine of a tiny model, and stop it."""
    full = open_full_model(save_tiny(family, directory, tie_word_embeddings=False))
    start_engine(full, Limits(), dtype=dtype).stop()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_served(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    start(family, tmp_path, dtype)


def blind_to_the_mask(monkeypatch: Patch) -> None:
    right = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def blind(*given: Any, **named: Any) -> Any:
        module, query, key, value, _, *others = given
        return right(module, query, key, value, None, *others, **named)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", blind)


def counting_columns(monkeypatch: Patch) -> None:
    """Let every row begin at position 0, its padding among them."""
    right = LlamaForCausalLM.forward

    def forward(self: Any, *given: Any, position_ids: Any = None, **named: Any) -> Any:
        return right(self, *given, **named)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)


def turned_around(monkeypatch: Patch) -> None:
    """Turn all tokens around and back: right by itself, but rows are not where they were."""
    right: Callable[..., torch.Tensor] = LlamaMLP.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return right(self, x.flatten(0, 1).flip(0)).flip(0).view_as(x)

    monkeypatch.setattr(LlamaMLP, "forward", forward)


@pytest.mark.parametrize("wrong", [blind_to_the_mask, counting_columns, turned_around])
def test_a_model_that_is_wrong_in_a_batch_is_refused(
    wrong: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch
) -> None:
    wrong(monkeypatch)
    with pytest.raises(FamilyError, match=r"llama computes something else in a batch \(off by"):
        start("llama", tmp_path)
