# SPDX-License-Identifier: Apache-2.0
"""The full model read block by block from the disk, each block once for all sequences."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from offsite_ray.architectures import BlockCall, Skeleton, block_model, get_blocks
from offsite_ray.bundle import TORCH_DTYPES
from offsite_ray.calibration.text import inputs_of
from offsite_ray.data import IGNORED
from offsite_ray.errors import FamilyError
from offsite_ray.training.head import Head, head_losses, next_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from offsite_ray.full_model import FullModel
    from offsite_ray.training.protocols import Batch


class BlockwiseModel:
    """The full model at some text, of which what is outside the blocks is in memory."""

    def __init__(
        self,
        full: FullModel,
        batches: Sequence[Batch],
        device: torch.device | None = None,
        held_bytes: int = 0,
    ) -> None:
        """Load what is outside the blocks.

        Args:
            full: The full model, on disk.
            batches: Rows of text, nothing of it padding; each as many as fit through a block.
            device: Where blocks run; by default a GPU if there is one.
            held_bytes: Blocks that are no more than this together stay in memory once read.

        Raises:
            FamilyError: A block needs what another has computed, beside the hidden states.
        """
        if getattr(full.config, "num_kv_shared_layers", 0):
            raise FamilyError(
                f"{full.config.model_type} shares keys and values between blocks, so they cannot "
                "be run one by one; choose a method that needs no calibration, such as uniform"
            )
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._full, self._batches = full, batches
        self._names: dict[int | None, list[str]] = {}
        for name in full.weights.tensors:
            self._names.setdefault(full.arch.block_of(name), []).append(name)
        outside = {name: full.weights.read(name) for name in self._names.get(None, [])}
        self._skeleton = Skeleton(full.config, full.arch, outside, _dtype(full))
        self._skeleton.model.requires_grad_(False).to(self._device)
        self._head = Head(self._skeleton.model)
        self._calls: list[list[BlockCall]] = []
        inside = (info for info in full.weights.tensors.values() if info.name not in outside)
        self._holds = sum(info.nbytes for info in inside) <= held_bytes
        self._held: dict[int, nn.Module] = {}

    @torch.no_grad()
    def begin(self) -> list[Tensor]:
        """Return the hidden states ``(B, T, H)`` of each batch before the first block."""
        begun = [self._skeleton.begin(**inputs_of(b, self._device)) for b in self._batches]
        self._calls = [calls for _, calls in begun]
        return [hidden for hidden, _ in begun]

    def block(self, index: int) -> nn.Module:
        """Return a block, frozen: read from the disk, unless all of them stay in memory."""
        if index in self._held:
            return self._held[index]
        full = self._full
        disk = {name: full.weights.read(name) for name in self._names[index]}
        model = block_model(full.config, full.arch, [index], disk).eval().requires_grad_(False)
        block: nn.Module = get_blocks(model, full.arch)[0].to(self._device)
        if self._holds:
            self._held[index] = block
        return block

    def run(self, index: int, block: nn.Module, number: int, hidden: Tensor) -> Tensor:
        """Return the hidden states of a batch behind a block; :meth:`begin` comes first."""
        return self._calls[number][index].run(block, hidden.to(self._device))

    def loss(self, number: int, hidden: Tensor) -> Tensor:
        """Return the cross-entropy of a batch, summed, by hidden states behind the last block."""
        batch = self._batches[number]
        behind = self._skeleton.end(hidden, **inputs_of(batch, self._device))
        targets = next_tokens(batch["labels"].to(self._device))
        return head_losses(self._head, behind, None, targets, {"lm": _cross_entropy})["lm"]


def _cross_entropy(logits: Tensor, _: Tensor | None, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def _dtype(full: FullModel) -> torch.dtype:
    """Return the dtype that holds all that are stored."""
    stored = {TORCH_DTYPES[info.dtype] for info in full.weights.tensors.values()}
    floating = [dtype for dtype in stored if dtype.is_floating_point]
    dtype = floating[0]
    for other in floating[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


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
    model = BlockwiseModel(full, batches, device)
    states = model.begin()
    for index in range(full.arch.num_blocks):
        block = model.block(index)
        with nullcontext() if around is None else around(index, block):
            for number, before in enumerate(states):
                states[number] = model.run(index, block, number, before)
                see(index, before, states[number])
