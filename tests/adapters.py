# SPDX-License-Identifier: Apache-2.0
"""Adapter bundles without a training run: as they begin, or moved by noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from offsite_ray.adapter import write_adapter
from offsite_ray.architectures import load_model
from offsite_ray.config import FinetuneConfig
from offsite_ray.emulator import open_bundle
from offsite_ray.finetuning.host import host_of_bundle
from offsite_ray.finetuning.methods import finetuning_method

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

METHODS = ("full", "lora", "bottleneck", "bitfit")


def make_adapter(
    bundle_dir: Path, out: Path, *, method: str = "full", noise: float = 0.0, rank: int = 4
) -> PreTrainedModel:
    """Write an adapter bundle; return the emulator model that computes with it.

    Args:
        bundle_dir: Emulator bundle that it is for.
        out: Directory to write.
        method: Fine-tuning method.
        noise: Standard deviation of what is added to everything that the method trains; 0 is an
            untrained adapter.
        rank: Of LoRA and bottlenecks.
    """
    bundle = open_bundle(bundle_dir)
    host = host_of_bundle(bundle)
    config = FinetuneConfig(
        bundle=str(bundle_dir), data=("unused.txt",), out=str(out), method=method, rank=rank
    )
    row = finetuning_method(method)
    model = load_model(bundle_dir)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # LoRA and bottlenecks begin at random too
        row.prepare(model, bundle.arch, tuple(host.positions.values()), config)
        state = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        for tensor in state.values():
            tensor.add_((noise * torch.randn(tensor.shape)).to(tensor.dtype))
    write_adapter(
        bundle, out, lambda tmp: row.save(tmp, state, host, config), {"method": method}, {}
    )
    return model
