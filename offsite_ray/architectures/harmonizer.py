# SPDX-License-Identifier: Apache-2.0
"""Harmonizers: low-rank maps in the place of blocks, in the form of the blocks (ScaleOT).

``h + up(act(down(norm(h))))`` is a block of its own family whose attention is zero, and of whose
feed-forward a few inner channels are not. So the stock class computes it, gated or not. What is
zero there has no gradient (but for a bias behind attention): training leaves the rank as it is.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offsite_ray.architectures.linear import feed_forward, linear_layers, widths
from offsite_ray.errors import ConfigError, FamilyError

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Nothing(nn.Module):
    """A linear layer of zeros, which computes nothing and has no weights."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self._num_outputs = num_outputs

    def forward(self, inputs: Tensor) -> Tensor:
        """Return zeros in the place of outputs."""
        return inputs.new_zeros(*inputs.shape[:-1], self._num_outputs)


def harmonizer(block: nn.Module, rank: int) -> nn.Module:
    """Return a fresh harmonizer with the norms of a block; it changes nothing yet.

    What goes into its inner channels is drawn as a linear layer's weights are. It shares nothing
    with the block, and all its parameters train.

    Args:
        block: Of the full model; not changed.
        rank: Number of live inner channels.

    Raises:
        FamilyError: The block has no feed-forward of which a few channels could stay.
        ConfigError: Its feed-forward has fewer channels.
    """
    inner = feed_forward(block)
    if inner is None:
        raise FamilyError(
            f"the feed-forward of a {type(block).__name__} has no inner channels of its own (it "
            "is fused, or made of experts), so no harmonizer has its form; select by another method"
        )
    ups, down = inner
    layers: dict[str, Any] = linear_layers(block)
    if rank > (num_channels := widths(layers[down])[0]):
        raise ConfigError(
            f"harmonizer_rank={rank} is more than the {num_channels} inner channels of a "
            f"{type(block).__name__}"
        )
    # Not copied, because they go: the large ones.
    shared = {id(p): p for layer in layers.values() for p in layer.parameters()}
    result = copy.deepcopy(block, dict(shared))
    for path, layer in layers.items():
        num_inputs, num_outputs = widths(layer)
        own: nn.Module = _Nothing(num_outputs)
        if path in ups:
            own = _same_kind(layer, num_inputs, rank)
        elif path == down:
            own = _same_kind(layer, rank, num_outputs)
            for parameter in own.parameters():
                nn.init.zeros_(parameter)
        result.set_submodule(path, own)
    reference = next(block.parameters())
    return result.to(reference.device, reference.dtype).requires_grad_(True)


def _same_kind(layer: Any, num_inputs: int, num_outputs: int) -> nn.Module:
    """Return a fresh linear layer that stores its weight the same way round."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(num_inputs, num_outputs, bias=layer.bias is not None)
    own: nn.Module = type(layer)(num_outputs, num_inputs)
    return own


def in_full(live: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor of a harmonizer as a block has it: the live part first, zeros behind it."""
    result = torch.zeros(tuple(shape), dtype=live.dtype)
    result[tuple(slice(0, size) for size in live.shape)] = live
    return result
