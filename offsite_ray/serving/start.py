# SPDX-License-Identifier: Apache-2.0
"""An engine of a full model, checked before it takes a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.func import functional_call

from offsite_ray.architectures import get_blocks, linear_layers, load_model, load_tokenizer
from offsite_ray.errors import FamilyError
from offsite_ray.serving.engine import Bounds, Engine
from offsite_ray.serving.model import BatchModel
from offsite_ray.serving.own import Own, Pair
from offsite_ray.serving.residency import Residency
from offsite_ray.serving.routing import BASE, maps_rows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from offsite_ray.architectures import Architecture
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

    One row is of the full model, the others of tenants, by themselves with their weights put in.

    Raises:
        FamilyError: They differ.
    """
    size = loaded.config.get_text_config().vocab_size
    rows = [[7 * i * i + 3 * i + n for i in range(n)] for n in (9, 4, 6)]
    rows = [[token % size for token in row] for row in rows]
    tenants = _tenants(loaded, model.router.arch)
    weights: list[dict[str, Tensor]] = [{}, *(put_in for _, put_in in tenants)]
    ids = [torch.tensor([row], device=model.device) for row in rows]
    alone = torch.cat(
        [functional_call(loaded, *given).logits[:, -1] for given in zip(weights, ids, strict=True)]
    )
    for number, (own, _) in enumerate(tenants, BASE + 1):
        model.router.put(number, own)
    cache, late = model.new_cache(2), model.new_cache(1)
    model.forward([row[:-2] for row in rows[:2]], (0, 1), cache)
    model.forward([row[-2:-1] for row in rows[:2]], (0, 1), cache)
    model.forward([rows[2][:-1]], (2,), late)
    cache.join(late, [0])
    batched = model.forward([row[-1:] for row in rows], (0, 1, 2), cache)[:, -1]
    for number in model.router.tenants - {BASE}:
        model.router.remove(number)
    slip = (batched - alone.float()).abs().max() / alone.float().std()
    if not slip < _SLIP * (1 if model.dtype.itemsize >= 4 else 100):
        raise FamilyError(
            f"{loaded.config.model_type} computes something else in a batch (off by {slip:.2g} of "
            "the logits' spread), so it is not served; serve its plugged-in models one by one"
        )


def _tenants(loaded: PreTrainedModel, arch: Architecture) -> list[tuple[Own, dict[str, Tensor]]]:
    """Make up a tenant with its own weights in the first block, and one with low-rank additions.

    Returns:
        What each has, and the same as parameters of the full model, by name.
    """
    weights, pairs, merged = {}, {}, {}
    for name, module in get_blocks(loaded, arch)[0].named_modules(prefix=f"{arch.family.blocks}.0"):
        if maps_rows(module):
            weights[name] = {n: p.flip(0) for n, p in module.named_parameters(recurse=False)}
        # What is added rounds twice: little in float32, and in 16 bits too much to compare.
        if "" in linear_layers(module) and loaded.dtype.itemsize >= 4:
            weight = module.get_parameter("weight").clone()
            by_output = weight if isinstance(module, nn.Linear) else weight.T  # GPT-2's
            some = by_output[:, : by_output.shape[1] // 8]
            down = torch.eye(some.shape[1], by_output.shape[1]).to(weight)
            pairs[name] = Pair(down=down, up=-2 * some)
            some.neg_()
            merged[f"{name}.weight"] = weight
    put_in = {f"{name}.{n}": tensor for name, own in weights.items() for n, tensor in own.items()}
    return [(Own(weights=weights), put_in), (Own(pairs=pairs), merged)]


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
