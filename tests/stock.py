# SPDX-License-Identifier: Apache-2.0
"""Model directories as anybody sees them: by stock transformers and safetensors, not the table."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from offsite_ray.config import CompressConfig, PlugInConfig
from offsite_ray.emulator import compress
from offsite_ray.plug_in import PlugInResult, plug_in

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

_AutoModel: Any = AutoModelForCausalLM

TOKENS = (torch.arange(24) * 7 % 97 + 1).view(2, 12)
"""Longer than the tiny models' sliding windows; never the end of the text."""

CUT = "adapter=0,3,5 emulator=1,4"
KEPT = (0, 1, 3, 4, 5)
"""The plan of most tests, and the blocks that it keeps."""


def cut(model: Path, plan: str, out: Path) -> Path:
    compress(CompressConfig(model=str(model), plan=plan, out=str(out)))
    return out


def plug(model: Path, adapter: Path, out: Path) -> PlugInResult:
    return plug_in(PlugInConfig(model=str(model), adapter=str(adapter), out=str(out)))


def stock(directory: Path) -> PreTrainedModel:
    """Load as anybody would; whatever is missing, unknown or of another shape fails the test."""
    model, info = _AutoModel.from_pretrained(str(directory), dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    model.eval()
    loaded: PreTrainedModel = model
    return loaded


@torch.no_grad()
def logits_of(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


def blocks_in(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of blocks without the help of the package's table."""
    base = model.base_model
    owner = getattr(base, "decoder", base)
    blocks = owner.h if hasattr(owner, "h") else owner.layers
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def put_blocks(model: PreTrainedModel, blocks: nn.ModuleList) -> None:
    base = model.base_model
    owner = getattr(base, "decoder", base)
    setattr(owner, "h" if hasattr(owner, "h") else "layers", blocks)


def stored(directory: Path) -> dict[str, Tensor]:
    """Return every tensor of a model directory, read by the safetensors library."""
    files = [path for path in directory.glob("*.safetensors") if "bottleneck" not in path.name]
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def same_bytes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(map(sorted, (found, expected))) == [sorted(expected)] * 2 and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and torch.equal(
            found[name].contiguous().flatten().view(torch.uint8),
            tensor.contiguous().flatten().view(torch.uint8),
        )
        for name, tensor in expected.items()
    )


def block_index(name: str) -> int | None:
    match = re.search(r"(?:^|\.)(?:h|layers)\.(\d+)\.", name)
    return int(match[1]) if match else None
