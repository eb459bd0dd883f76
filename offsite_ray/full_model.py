# SPDX-License-Identifier: Apache-2.0
"""The full model on disk: opened, counted and, for an unknown family, tried on a few tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from offsite_ray.architectures import (
    Architecture,
    Notice,
    block_parameters,
    kept_config,
    load_config,
    load_model,
    model_class,
    quiet_transformers,
    resolve_architecture,
)
from offsite_ray.bundle import TensorDirectory
from offsite_ray.errors import FamilyError, IntegrityError, first_line
from offsite_ray.storage import model_at

if TYPE_CHECKING:
    from pathlib import Path

    from transformers.configuration_utils import PretrainedConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FullModel:
    """A full model on disk: its parts without its weights in memory."""

    path: Path
    config: PretrainedConfig
    arch: Architecture
    weights: TensorDirectory


def open_full_model(
    name: str | Path, blocks: str | None = None, notice: Notice | None = None
) -> FullModel:
    """Return the full model of a directory, a URI or the hub, its weights looked at, not loaded.

    Raises:
        StorageError: There is none.
        FamilyError: Its family is in no table and its structure is ambiguous.
        IntegrityError: Its weights do not hold the blocks that its config promises.
    """
    path = model_at(name)
    config = load_config(path)
    arch = resolve_architecture(config, blocks, notice)
    weights = TensorDirectory.of_model(path)
    check_block_count(path, arch, weights)
    return FullModel(path=path, config=config, arch=arch, weights=weights)


def check_block_count(path: Path, arch: Architecture, weights: TensorDirectory) -> None:
    """Check that the weights hold every block of the config and no other."""
    found = {arch.block_of(name) for name in weights.tensors} - {None}
    expected = set(range(arch.num_blocks))
    if odd := sorted(index for index in expected ^ found if index is not None):
        state = "lack" if odd[0] in expected else "hold"
        raise IntegrityError(
            f"the weights in {path} {state} block {odd[0]}, and its config.json has "
            f"{arch.num_blocks} blocks"
        )


@torch.no_grad()
def check_by_example(full: FullModel) -> None:
    """Check invariants 1 and 2 on a few tokens, for a family that is in no table.

    Raises:
        FamilyError: The model, cut and put together again, computes something else, or takes no
            sequence of so few tokens.
    """
    model = load_model(full.path, auto_class=full.arch.family.auto_class)
    tokens = (torch.arange(12) * 7 % full.config.vocab_size)[None]
    try:
        expected = model(tokens).logits
    except Exception as error:
        raise FamilyError(
            f"model type {full.config.model_type!r} is in no table of families, and cannot be "
            f"checked on {tokens.numel()} tokens: {first_line(error)}; use a model that takes as "
            "many, or add a row to offsite_ray/architectures/families.py"
        ) from error
    every = range(full.arch.num_blocks)
    config = kept_config(full.config, full.arch, every)
    state = {name: full.weights.read(name) for name in full.weights.tensors}
    with quiet_transformers():
        rebuilt = model_class(config).from_pretrained(
            None, config=config, state_dict=state, dtype=model.dtype
        )
    rebuilt.eval()
    if not torch.equal(rebuilt(tokens).logits, expected):
        raise FamilyError(
            f"model type {full.config.model_type!r} does not compute the same once its blocks are "
            "cut and put together again; it needs a row of its own in the table of families"
        )
    blocks = {n: t for n, t in state.items() if full.arch.block_of(n) is not None}
    rebuilt.load_state_dict(block_parameters(full.config, full.arch, blocks), strict=False)
    if not torch.equal(rebuilt(tokens).logits, expected):
        raise FamilyError(
            f"model type {full.config.model_type!r} does not compute the same with its own blocks "
            "plugged in; it needs a row of its own in the table of families"
        )
