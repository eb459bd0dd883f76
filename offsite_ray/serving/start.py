# SPDX-License-Identifier: Apache-2.0
"""An engine of a full model, checked before it takes a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from offsite_ray.architectures import load_model, load_tokenizer
from offsite_ray.errors import FamilyError
from offsite_ray.serving.engine import Bounds, Engine
from offsite_ray.serving.model import BatchModel
from offsite_ray.serving.residency import Residency

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from offsite_ray.config import Limits
    from offsite_ray.emulator import FullModel

_SLIP = 1e-3
"""Of the logits' spread, what a batch may differ by from a row alone."""


def start_engine(
    full: FullModel,
    limits: Limits,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    max_tenant_bytes: int | None = None,
) -> Engine:
    """Load a full model and start an engine on it.

    Args:
        full: The model, on disk.
        limits: What is taken on at once.
        dtype: Of the weights in memory; by default as stored.
        device: Where to compute.
        max_tenant_bytes: Of tenants' tensors on the device; without it all may stay there.

    Raises:
        FamilyError: It cannot be computed in batches whose rows come and go.
    """
    loaded = load_model(full.path, dtype=dtype, device=device)
    model = BatchModel(loaded, full.arch)
    check_batches(loaded, model)
    engine = Engine(
        model,
        load_tokenizer(full.path),
        Residency(model.router, max_tenant_bytes),
        Bounds(
            vocab_size=full.config.vocab_size,
            max_positions=max_positions(full.config),
            end_tokens=frozenset(end_tokens(loaded)),
        ),
        limits,
    )
    engine.start()
    return engine


@torch.inference_mode()
def check_batches(loaded: PreTrainedModel, model: BatchModel) -> None:
    """Compare a batch with padding, a joined row and a decoding step with each row by itself.

    Raises:
        FamilyError: They differ.
    """
    size = loaded.config.get_text_config().vocab_size
    rows = [[7 * i * i + 3 * i + n for i in range(n)] for n in (9, 4, 6)]
    rows = [[token % size for token in row] for row in rows]
    alone = torch.cat(
        [loaded(torch.tensor([row], device=model.device)).logits[:, -1] for row in rows]
    )
    cache, late = model.new_cache(2), model.new_cache(1)
    model.forward([row[:-2] for row in rows[:2]], (0, 0), cache)
    model.forward([row[-2:-1] for row in rows[:2]], (0, 0), cache)
    model.forward([rows[2][:-1]], (0,), late)
    cache.join(late, [0])
    batched = model.forward([row[-1:] for row in rows], (0, 0, 0), cache)[:, -1]
    slip = (batched - alone.float()).abs().max() / alone.float().std()
    if not slip < _SLIP * (1 if model.dtype == torch.float32 else 100):
        raise FamilyError(
            f"{loaded.config.model_type} computes something else in a batch (off by {slip:.2g} of "
            "the logits' spread), so it is not served; serve its plugged-in models one by one"
        )


def max_positions(config: PretrainedConfig) -> int:
    """Return how many tokens a text may have; a large number where the model sets no limit."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return 2**31 if found is None else int(found)


def end_tokens(loaded: PreTrainedModel) -> list[int]:
    """Return the tokens that end a text."""
    settings = loaded.generation_config
    ends = settings.eos_token_id if settings is not None else loaded.config.eos_token_id
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)
