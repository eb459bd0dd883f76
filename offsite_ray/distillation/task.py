# SPDX-License-Identifier: Apache-2.0
"""What workers are sent: which emulator is trained against which full model, on what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from offsite_ray.architectures import DTYPES, load_config, load_model, resolve_architecture
from offsite_ray.data import PreparedData, split_blocks
from offsite_ray.distillation.cache import CachedBlocks, open_cache
from offsite_ray.distillation.losses import active_losses
from offsite_ray.distillation.module import distillation_module
from offsite_ray.storage import fetched
from offsite_ray.training import loaded_dtype, set_dtypes

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from offsite_ray.config import DistillConfig
    from offsite_ray.distillation.cache import CacheTask
    from offsite_ray.split import SplitPlan
    from offsite_ray.training.protocols import TokenDataset


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillTask:
    """An emulator in the middle of its full model. Plain values: it is shipped to workers."""

    model: str
    """By which every node finds it, as the next."""
    bundle: str
    bundle_id: str
    plan: SplitPlan
    blocks: str | None
    config: DistillConfig
    data: PreparedData
    use_positions: bool
    cache: CacheTask | None = None
    """Where the teacher's outputs are read from; None: the teacher runs."""
    flops_per_token: float | None = None
    """Operations of a training step for each token, without recomputation; None: not counted."""

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Part of the loss to its weight; parts without one are not computed."""
        return {name: loss.weight(self.config) for name, loss in self._losses.items()}

    @property
    def loss_units(self) -> Mapping[str, Literal["token", "sequence"]]:
        """Part of the loss to what its sum is divided by."""
        return {name: loss.unit for name, loss in self._losses.items()}

    @property
    def _losses(self) -> Mapping[str, Any]:
        return active_losses(self.config)

    @property
    def runs_teacher(self) -> bool:
        """Whether the full model is needed in memory."""
        return self.cache is None and any(loss.needs_teacher for loss in self._losses.values())

    def build(self, device: torch.device) -> nn.Module:
        """Return the module that is trained; see :func:`distillation_module`."""
        compute = DTYPES[self.config.dtype]
        stored = loaded_dtype(compute)
        full = (
            load_model(fetched(self.model), dtype=stored, dropout=False)
            if self.runs_teacher
            else None
        )
        bundle = fetched(self.bundle)
        emulator = load_model(bundle, dtype=stored, dropout=False)
        module = distillation_module(
            full,
            emulator,
            resolve_architecture(load_config(bundle), self.blocks),
            self.plan,
            self.config,
            use_positions=self.use_positions,
        )
        set_dtypes(module, compute)
        return module.to(device)

    def datasets(self) -> tuple[TokenDataset, TokenDataset]:
        """Return the rows to train on and the held-out ones."""
        both = split_blocks(self.data.at_hand, self.config.eval_fraction, self.config.seed)
        if self.cache is None:
            return both
        cache, ends = open_cache(Path(self.cache.directory), self.cache.key), self.cache.key.ends
        train, held_out = (CachedBlocks(blocks, cache, ends) for blocks in both)
        return train, held_out

    def fingerprint(self) -> dict[str, Any]:
        """Return what a checkpoint must agree on to be resumed."""
        return {"bundle": self.bundle_id, "data": self.data.digest}
