# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751): a small residual net after a block.

``h + up(relu(down(h)))`` with ``down`` of shape ``(rank, hidden)`` and ``up`` of
``(hidden, rank)``, zero at first, so that an untrained one changes nothing. It cannot be merged
into the block, so a plugged-in model that has one says so in its ``model_type``, which stock
transformers refuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offsite_ray.architectures.detection import Architecture, get_blocks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

BOTTLENECK_TYPE = "offsite_bottleneck"
"""``model_type`` of a plugged-in model with bottleneck adapters."""

BOTTLENECK_FILE = "bottleneck.safetensors"
"""Where such a directory has their tensors, under absolute names."""

BOTTLENECK_NAME = "offsite_bottleneck"
"""Name of the module inside its block."""


class Bottleneck(nn.Module):
    """The residual net; maps ``(B, T, H)`` to ``(B, T, H)``."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        """Draw ``down`` as a linear layer does and set ``up`` to zero."""
        super().__init__()
        self.down = nn.Linear(hidden_size, rank)
        self.up = nn.Linear(rank, hidden_size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``hidden`` with the net's output added, in the dtype of ``hidden``."""
        inner = self.down(hidden.to(self.down.weight.dtype))
        added: Tensor = self.up(torch.relu(inner)).to(hidden.dtype)
        return hidden + added


def attach_bottlenecks(
    model: PreTrainedModel, arch: Architecture, indices: Sequence[int], rank: int
) -> list[Any]:
    """Put a fresh bottleneck after each of the blocks; return the handles that detach them."""
    handles = []
    for index in indices:
        block = get_blocks(model, arch)[index]
        reference = next(block.parameters())
        net = Bottleneck(model.config.hidden_size, rank).to(reference.device)
        block.add_module(BOTTLENECK_NAME, net)
        handles.append(block.register_forward_hook(_after_block))
    return handles


def detach_bottlenecks(
    model: PreTrainedModel, arch: Architecture, indices: Sequence[int], handles: Sequence[Any]
) -> None:
    """Undo :func:`attach_bottlenecks`."""
    for index, handle in zip(indices, handles, strict=True):
        handle.remove()
        delattr(get_blocks(model, arch)[index], BOTTLENECK_NAME)


def set_bottlenecks(
    model: PreTrainedModel, arch: Architecture, tensors: Mapping[str, Tensor]
) -> tuple[list[int], list[Any]]:
    """Attach bottlenecks with the given tensors, named as in the model; return what detaches."""
    indices = sorted({index for name in tensors if (index := arch.block_of(name)) is not None})
    rank = next(t.shape[0] for name, t in tensors.items() if name.endswith(".down.weight"))
    handles = attach_bottlenecks(model, arch, indices, rank)
    for name, tensor in tensors.items():
        parameter = model.get_parameter(name)
        parameter.data = tensor.to(parameter.device)
        parameter.requires_grad_(False)
    return indices, handles


def load_bottlenecks(model: PreTrainedModel, arch: Architecture, file: Path) -> None:
    """Attach the bottlenecks that a plugged-in directory has in ``file``."""
    from safetensors.torch import load_file

    set_bottlenecks(model, arch, load_file(file))


def _after_block(block: nn.Module, _inputs: Any, output: Any) -> Any:
    net = getattr(block, BOTTLENECK_NAME)
    if isinstance(output, tuple):
        return (net(output[0]), *output[1:])
    return net(output)
