# SPDX-License-Identifier: Apache-2.0
"""Bundles with harmonizers, and what of these is zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from offsite_ray.architectures import feed_forward, linear_layers
from offsite_ray.calibration.replacement import HarmonizerTraining
from offsite_ray.config import CompressConfig
from offsite_ray.inspection import inspect_path

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

RANK = 4
MIDDLE = (1, 2, 3, 4)
HOW = HarmonizerTraining(rank=RANK, steps=8, seed=0)


def config(model: Path, out: Path, text: Path, **given: Any) -> CompressConfig:
    return CompressConfig(
        model=str(model),
        out=str(out),
        calibration=(str(text),),
        select="layer_replace",
        **{
            "plan": "1-2-1",
            "calibration_sequences": 6,
            "calibration_seq_len": 16,
            "harmonizer_rank": RANK,
            "harmonizer_steps": 6,
            **given,
        },
    )


def harmonized(bundle: Path) -> list[int]:
    blocks: list[int] = inspect_path(bundle)["recipe"]["selection"]["harmonizers"]["blocks"]
    return blocks


def dead_parts(block: nn.Module) -> dict[str, Tensor]:
    """Return what of a harmonizer is zero: linear layers, but the first channels and a bias."""
    inner = feed_forward(block)
    assert inner is not None
    ups, down = inner
    found = {}
    layers: dict[str, Any] = linear_layers(block)
    for path, layer in layers.items():
        weight = layer.weight.data
        weight = weight if isinstance(layer, nn.Linear) else weight.T
        if path in ups:
            weight = weight[RANK:]
        elif path == down:
            weight = weight[:, RANK:]
        found[path] = weight
    return found
