# SPDX-License-Identifier: Apache-2.0
"""A training step without memory: the module's own forward and backward pass, on shapes alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from offsite_ray.rehearsal.kernels import kernels_of
from offsite_ray.rehearsal.ledger import Bytes, Ledger, Operations

if TYPE_CHECKING:
    from collections.abc import Mapping

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What one forward and backward pass of a module takes."""

    weights: int
    """Bytes of parameters and buffers."""
    trained: int
    """Parameters that train."""
    frozen: int
    """Parameters that do not."""
    largest: int
    """Elements of the largest parameter."""
    most: Bytes
    """When gradients and the rest together are the most."""
    most_others: Bytes
    """When the rest alone is: what counts where gradients go elsewhere as they come."""
    operations: Operations


def empty_batch(batch_size: int, seq_len: int, *, positions: bool) -> dict[str, Tensor]:
    """Return a batch ``(B, T)`` without content; ``positions``: of several documents a row."""
    names = ["input_ids", "labels", *(["position_ids"] if positions else [])]
    return {
        name: torch.empty(batch_size, seq_len, dtype=torch.long, device="meta") for name in names
    }


def rehearse(
    module: nn.Module, batch: Mapping[str, Tensor], *, device: str = "cuda", autocast: bool
) -> Rehearsal:
    """Return what a step of a module takes on a device that need not be there.

    Args:
        module: On the ``meta`` device; ``forward(**batch)`` gives parts of a loss. Changed, and of
            no other use afterwards.
        batch: Tensors on the ``meta`` device.
        device: ``cpu`` or ``cuda``.
        autocast: Whether the forward pass is in bf16 autocast.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _stand_in(module, mode)
    given = {name: FakeTensor(mode, tensor, _CPU) for name, tensor in batch.items()}
    ledger = Ledger(module)
    with mode, ledger, kernels_of(device, packed="position_ids" in batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            parts = module(**given)
        loss = sum(parts.values())
        del parts
        loss.backward()
    parameters = list(module.parameters())
    return Rehearsal(
        weights=_nbytes(itertools.chain(parameters, module.buffers())),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        largest=max(p.numel() for p in parameters),
        most=ledger.most,
        most_others=ledger.most_others,
        operations=ledger.operations,
    )


def _nbytes(tensors: Any) -> int:
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def _stand_in(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace a module's tensors by stand-ins for tensors with memory; shared ones stay shared."""
    found: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in found:
            own: Tensor = FakeTensor(mode, tensor.detach().to("meta"), _CPU)
            if isinstance(tensor, nn.Parameter):
                own = nn.Parameter(own, requires_grad=tensor.requires_grad)
            found[id(tensor)] = own
        return found[id(tensor)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = stand_in(tensor)  # type: ignore[assignment]
