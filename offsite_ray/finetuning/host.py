# SPDX-License-Identifier: Apache-2.0
"""A model on disk that adapter blocks sit in: the full model, or an emulator model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers.configuration_utils import PretrainedConfig

    from offsite_ray.architectures import Architecture
    from offsite_ray.bundle import TensorDirectory
    from offsite_ray.emulator import EmulatorBundle, FullModel
    from offsite_ray.split import SplitPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Where each adapter block is in a model, and under which names."""

    path: Path
    config: PretrainedConfig
    arch: Architecture
    weights: TensorDirectory
    positions: Mapping[int, int]
    """Absolute index of an adapter block to its index in this model."""

    @property
    def block_names(self) -> list[str]:
        """Names on disk of the tensors of adapter blocks."""
        places = set(self.positions.values())
        return [name for name in self.weights.tensors if self.arch.block_of(name) in places]

    @property
    def other_files(self) -> list[Path]:
        """Files without a tensor of adapter blocks, which no adapter changes."""
        own = {self.weights.tensors[name].file for name in self.block_names}
        return [file for file in self.weights.files if file not in own]

    def full_name(self, name: str) -> str:
        """Return the name in the full model of an adapter block's tensor (or module)."""
        index = self.arch.block_of(name)
        absolute = {position: index for index, position in self.positions.items()}
        if index is None or index not in absolute:
            return name
        return self.arch.rename(name, absolute[index])

    def own_name(self, name: str) -> str:
        """Return the name in this model of a tensor named as in the full model."""
        index = self.arch.block_of(name)
        if index is None or index not in self.positions:
            return name
        return self.arch.rename(name, self.positions[index])


def host_of_bundle(bundle: EmulatorBundle) -> Host:
    """Return the emulator model as a host of its plan's adapter blocks."""
    kept = bundle.plan.kept
    return Host(
        path=bundle.path,
        config=bundle.config,
        arch=bundle.arch,
        weights=bundle.weights,
        positions={index: kept.index(index) for index in bundle.plan.adapter},
    )


def host_of_full_model(full: FullModel, plan: SplitPlan | None = None) -> Host:
    """Return the full model as a host of a plan's adapter blocks, or of all its blocks."""
    indices = range(full.arch.num_blocks) if plan is None else plan.adapter
    return Host(
        path=full.path,
        config=full.config,
        arch=full.arch,
        weights=full.weights,
        positions={index: index for index in indices},
    )
