# SPDX-License-Identifier: Apache-2.0
"""The paper's ablations (Xiao et al., arXiv 2302.04870) as spaces, for a model of any depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

_PAPER_BLOCKS = 24
"""Blocks of OPT-1.3B, the model of these ablations; counts of blocks are scaled from it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """An ablation of the paper."""

    name: str
    about: str
    variants: Callable[[int], Sequence[Mapping[str, Any]]]
    """Blocks of the full model to spaces, as ``parse_space`` takes them."""


def _placement(num_blocks: int) -> list[Mapping[str, Any]]:
    """Adapter blocks at the bottom, at the top, at both ends; nothing is dropped."""
    plans = []
    for pads in _pads(num_blocks):
        for bottom, top in ((pads, 0), (0, pads), (pads // 2, pads - pads // 2)):
            plans.append(f"{bottom}-{num_blocks - pads}-{top}")
    return [{"compress": {"plan": plans}}]


def _pads(num_blocks: int) -> list[int]:
    """Return the numbers of adapter blocks: 2, 4, 6, 8 of 24."""
    scaled = {max(2, 2 * round(pads * num_blocks / _PAPER_BLOCKS / 2)) for pads in (2, 4, 6, 8)}
    return sorted(pads for pads in scaled if pads < num_blocks)


def _compression(num_blocks: int) -> list[Mapping[str, Any]]:
    """Two adapter blocks at each end; the middle dropped, pruned or quantized, more and more."""
    middle = _middle(num_blocks)
    kept = sorted({max(1, round(middle * share / 10)) for share in range(1, 11)}, reverse=True)
    ratios = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    whole = f"2-{middle}-2"
    return [
        {"compress": {"plan": [f"2-{number}-2" for number in kept]}},
        {"compress": {"plan": whole, "compress": [f"prune:{ratio}" for ratio in ratios]}},
        {"compress": {"plan": whole, "compress": [f"quantize:{n}" for n in range(8, 0, -1)]}},
    ]


def _distillation(num_blocks: int) -> list[Mapping[str, Any]]:
    """One emulator, a third of the middle, undistilled and distilled by each part of the loss."""
    plan = _third(num_blocks)
    steps = {"max_steps": 200}
    losses: list[Mapping[str, Any]] = [
        {"max_steps": 0},
        {**steps, "hidden_weight": 0.0, "lm_weight": 1.0},
        {**steps, "hidden_weight": 30.0, "lm_weight": 0.0},
        {**steps, "hidden_weight": 30.0, "lm_weight": 1.0},
    ]
    return [{"compress": {"plan": plan}, "distill": loss} for loss in losses]


def _methods(num_blocks: int) -> list[Mapping[str, Any]]:
    """Fine-tuning methods inside the adapter blocks, against one distilled emulator."""
    from offsite_ray.finetuning import FINETUNING_METHODS

    return [
        {
            "compress": {"plan": _third(num_blocks)},
            "distill": {"max_steps": 200},
            "finetune": {"method": list(FINETUNING_METHODS)},
        }
    ]


def without_methods(
    variants: Sequence[Mapping[str, Any]], names: Collection[str]
) -> list[Mapping[str, Any]]:
    """Return spaces of a preset without the fine-tuning methods of some names."""
    found: list[Mapping[str, Any]] = []
    for variant in variants:
        finetune = variant.get("finetune", {})
        if "method" in finetune:
            kept = [name for name in finetune["method"] if name not in names]
            variant = {**variant, "finetune": {**finetune, "method": kept}}
        found.append(variant)
    return found


def _third(num_blocks: int) -> str:
    return f"2-{max(1, round(_middle(num_blocks) * 8 / 20))}-2"


def _middle(num_blocks: int) -> int:
    if num_blocks < 6:
        raise ConfigError(
            f"the full model has {num_blocks} blocks; the preset needs 6: two adapter blocks at "
            "each end and a middle"
        )
    return num_blocks - 4


PRESETS: dict[str, Ablation] = {
    row.name: row
    for row in (
        Ablation(name="figure3", about="placement of the adapter blocks", variants=_placement),
        Ablation(name="figure4", about="compression of the middle", variants=_compression),
        Ablation(name="table4", about="distillation of the emulator", variants=_distillation),
        Ablation(name="table5", about="fine-tuning methods", variants=_methods),
    )
}
"""Every preset by the name that ``--preset`` takes."""
