# SPDX-License-Identifier: Apache-2.0
"""The full model read block by block from the disk, each block once for all sequences."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from offsite_ray.architectures import Skeleton, block_model, get_blocks
from offsite_ray.bundle import TORCH_DTYPES
from offsite_ray.calibration.text import inputs_of
from offsite_ray.errors import FamilyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from offsite_ray.full_model import FullModel
    from offsite_ray.training.protocols import Batch


@torch.no_grad()
def blockwise_forward(
    full: FullModel,
    batches: Sequence[Batch],
    see: Callable[[int, Tensor, Tensor], None],
    device: torch.device | None = None,
    around: Callable[[int, nn.Module], AbstractContextManager[None]] | None = None,
) -> None:
    """Run sequences through the full model, one block after the other.

    In memory are the hidden states of every sequence, what is outside the blocks, and one block.

    Args:
        full: The full model, on disk.
        batches: Rows of text, nothing of it padding; each as many as fit through a block at once.
        see: Told of each block and batch, the blocks in order: the hidden states ``(B, T, H)``
            before and behind it.
        device: Where blocks run; by default a GPU if there is one.
        around: Given each block, what is entered before the first batch runs through it and left
            behind the last.

    Raises:
        FamilyError: A block needs what another has computed, beside the hidden states.
    """
    if getattr(full.config, "num_kv_shared_layers", 0):
        raise FamilyError(
            f"{full.config.model_type} shares keys and values between blocks, so they cannot be "
            "run one by one; choose a method that needs no calibration, such as uniform"
        )
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = full.weights.tensors
    outside = {name: full.weights.read(name) for name in names if full.arch.block_of(name) is None}
    skeleton = Skeleton(full.config, full.arch, outside, _dtype(full))
    skeleton.model.to(device)
    begun = [skeleton.begin(**inputs_of(batch, device)) for batch in batches]
    states = [hidden for hidden, _ in begun]
    for index, block in _blocks(full, device):
        with nullcontext() if around is None else around(index, block):
            for number, (_, calls) in enumerate(begun):
                before = states[number]
                states[number] = calls[index].run(block, before)
                see(index, before, states[number])


def _blocks(full: FullModel, device: torch.device) -> Iterator[tuple[int, nn.Module]]:
    """Yield the blocks in order, each read when it is asked for and then forgotten."""
    for index in range(full.arch.num_blocks):
        disk = {
            name: full.weights.read(name)
            for name in full.weights.tensors
            if full.arch.block_of(name) == index
        }
        model = block_model(full.config, full.arch, [index], disk).eval()
        yield index, get_blocks(model, full.arch)[0].to(device)


def _dtype(full: FullModel) -> torch.dtype:
    """Return the dtype that holds all that are stored."""
    stored = {TORCH_DTYPES[info.dtype] for info in full.weights.tensors.values()}
    floating = [dtype for dtype in stored if dtype.is_floating_point]
    dtype = floating[0]
    for other in floating[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype
