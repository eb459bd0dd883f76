# SPDX-License-Identifier: Apache-2.0
"""What a tenant has of its own: the trained tensors of one adapter bundle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A low-rank addition to the output of a linear layer: ``scale * up @ down @ x``."""

    down: Tensor
    """``(r, in)``."""
    up: Tensor
    """``(out, r)``, the scale in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Net:
    """A bottleneck behind a block: ``h + up @ relu(down @ h + a) + b``."""

    down: Tensor
    """``(r, H)``."""
    down_bias: Tensor
    up: Tensor
    """``(H, r)``."""
    up_bias: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Own:
    """What a tenant has of its own; keys are names of modules in the full model."""

    weights: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Parameters of a module, by name, that stand in for those of the full model."""
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    """Bias of a module that stands in for the full model's, its weight being common."""
    pairs: Mapping[str, Pair] = field(default_factory=dict)
    nets: Mapping[str, Net] = field(default_factory=dict)
    """By name of the block."""

    def tensors(self) -> list[Tensor]:
        """Return every tensor, for counting and moving."""
        found = [tensor for module in self.weights.values() for tensor in module.values()]
        found += self.biases.values()
        for group in (self.pairs, self.nets):
            for part in group.values():
                found += [getattr(part, name) for name in part.__slots__]
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def num_elements(self) -> int:
        """Numbers in all tensors."""
        return sum(tensor.numel() for tensor in self.tensors())

    def to(self, device: torch.device, dtype: torch.dtype) -> Own:
        """Return the same on a device and in the model's dtype."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype)

        return Own(
            weights={n: {p: moved(t) for p, t in m.items()} for n, m in self.weights.items()},
            biases={name: moved(tensor) for name, tensor in self.biases.items()},
            pairs={n: _each(pair, moved) for n, pair in self.pairs.items()},
            nets={n: _each(net, moved) for n, net in self.nets.items()},
        )

    @property
    def modules(self) -> set[str]:
        """Names of the modules that it changes."""
        return {*self.weights, *self.biases, *self.pairs, *self.nets}


def _each(part: Any, function: Any) -> Any:
    return type(part)(**{name: function(getattr(part, name)) for name in part.__slots__})
