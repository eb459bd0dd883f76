# SPDX-License-Identifier: Apache-2.0
"""Adapter blocks that compute each row of a batch with the weights of its own tenant.

Inside a block only the modules that carry weights differ between tenants: linear layers and norms.
They are the places where rows part and meet again; attention, its cache and everything between see
one batch. A tenant is to such a module what an expert is to a mixture of experts, and the request
names it. Every such module maps rows one by one, dimension 0 being the batch.

- Weights that a tenant has of its own (``full``) multiply that tenant's rows.
- What is added to the common result (``lora``, biases of ``bitfit``, ``bottleneck``) is computed
  for all rows at once, with the small matrices gathered row by row, as in Punica (Chen et al.,
  arXiv 2310.18547).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offsite_ray.architectures import get_blocks, linear_layers
from offsite_ray.errors import FamilyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from offsite_ray.architectures import Architecture
    from offsite_ray.serving.own import Own

BASE = 0
"""Number of the full model itself, which is a tenant without anything of its own."""


class Rows:
    """Which tenant each row of a forward is of."""

    def __init__(self, tenants: Sequence[int], device: torch.device) -> None:
        """Sort the rows of a batch by tenant.

        Args:
            tenants: Number of the tenant of each row.
            device: Of the model.
        """
        self.tenants = tuple(tenants)
        self.device = device
        by_tenant: dict[int, list[int]] = {}
        for row, tenant in enumerate(tenants):
            by_tenant.setdefault(tenant, []).append(row)
        self._of = {tenant: _places(rows, device) for tenant, rows in by_tenant.items()}
        self._groups: dict[frozenset[int], tuple[dict[int, Any], Any]] = {}

    def groups(self, having: frozenset[int]) -> tuple[dict[int, Any], Any]:
        """Return the rows of each tenant of a set, and those of the others; None without others."""
        if having not in self._groups:
            mine = {tenant: rows for tenant, rows in self._of.items() if tenant in having}
            others = [row for row, tenant in enumerate(self.tenants) if tenant not in having]
            rest = _places(others, self.device) if others else None
            self._groups[having] = mine, rest
        return self._groups[having]


def _places(rows: Sequence[int], device: torch.device) -> Any:
    """Return what takes rows out of a tensor: a slice where they are neighbours."""
    if list(rows) == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


class Stack:
    """Small tensors of tenants, of which those of a batch's rows lie one on the other.

    They are put there anew only when the batch has other rows: that is a copy for each row, and
    none for tenants that have no row.
    """

    def __init__(self) -> None:
        """Hold none."""
        self._parts: dict[int, tuple[Tensor, ...]] = {}
        self._tenants: tuple[int, ...] = ()
        self._gathered: tuple[Tensor, ...] | None = None

    def put(self, tenant: int, parts: tuple[Tensor, ...]) -> None:
        """Add what a tenant has."""
        self._parts[tenant] = parts
        self._tenants, self._gathered = (), None

    def remove(self, tenant: int) -> None:
        """Forget what a tenant has."""
        if self._parts.pop(tenant, None) is not None:
            self._tenants, self._gathered = (), None

    def gather(self, tenants: tuple[int, ...]) -> tuple[Tensor, ...] | None:
        """Return for each row what its tenant has, zeros without any; None if no row has any.

        Args:
            tenants: Number of the tenant of each row.
        """
        if tenants != self._tenants:
            self._tenants, self._gathered = tenants, None
            having = [row for row, tenant in enumerate(tenants) if tenant in self._parts]
            if having:
                columns = zip(*(self._parts[tenants[row]] for row in having), strict=True)
                self._gathered = tuple(_on_top(len(tenants), having, column) for column in columns)
        return self._gathered


def _on_top(num_rows: int, rows: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
    """Return ``(num_rows, ...)``: tensors at their rows, with zeros up to the largest of them."""
    shapes = [tensor.shape for tensor in tensors]
    if len(rows) == num_rows and len(set(shapes)) == 1:
        return torch.stack(list(tensors))
    room = tensors[0].new_zeros(num_rows, *map(max, zip(*shapes, strict=True)))
    for row, tensor in zip(rows, tensors, strict=True):
        room[row][tuple(slice(size) for size in tensor.shape)] = tensor
    return room


class RoutedModule(nn.Module):
    """A module with weights, in an adapter block of some tenant, in the place of the original."""

    def __init__(self, base: nn.Module, router: Router) -> None:
        """Compute as the original until a tenant has something of its own.

        Args:
            base: The original.
            router: Knows whose rows are computed.
        """
        super().__init__()
        self.base = base
        self._router = (router,)  # in a tuple, for it is no part of this module
        self._own: dict[int, nn.Module] = {}
        self._having: frozenset[int] = frozenset()
        self._pairs, self._biases = Stack(), Stack()

    def __getattr__(self, name: str) -> Any:
        """Return what this has, or else the original: some code reads a module's weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def put(self, tenant: int, own: Own, name: str) -> None:
        """Add what a tenant has of its own for this module."""
        if name in own.weights:
            self._own[tenant] = _with(self.base, **own.weights[name])
            self._having = frozenset(self._own)
        if name in own.biases:
            self._biases.put(tenant, (own.biases[name] - self.base.get_parameter("bias"),))
        if name in own.pairs:
            self._pairs.put(tenant, (own.pairs[name].down, own.pairs[name].up))

    def remove(self, tenant: int) -> None:
        """Forget a tenant."""
        if self._own.pop(tenant, None) is not None:
            self._having = frozenset(self._own)
        self._pairs.remove(tenant)
        self._biases.remove(tenant)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, ..., in)`` to ``(B, ..., out)``, each row with its tenant's weights.

        Where a family makes one row of each token, ``(B T, in)``, they are taken together again.
        """
        rows = self._router[0].rows
        if len(x) != len(rows.tenants):
            together = x.view(len(rows.tenants), -1, *x.shape[1:])
            flat: Tensor = self.forward(together).flatten(0, 1)
            return flat
        y = self._whole(x, rows)
        pairs = self._pairs.gather(rows.tenants)
        biases = self._biases.gather(rows.tenants)
        if pairs is not None:
            down, up = pairs
            flat = x.reshape(len(rows.tenants), -1, x.shape[-1])
            inner = torch.bmm(flat, down.transpose(1, 2))
            y = y + torch.bmm(inner, up.transpose(1, 2)).view(y.shape)
        if biases is not None:
            y = y + _beside(biases[0], y)
        return y

    def _whole(self, x: Tensor, rows: Rows) -> Tensor:
        """Return the product with the tenants' own weights, or the common ones."""
        mine, rest = rows.groups(self._having)
        if not mine:
            return self.base(x)  # type: ignore[no-any-return]
        if rest is None and len(mine) == 1:
            return self._own[next(iter(mine))](x)  # type: ignore[no-any-return]
        parts = [(self._own[tenant](x[places]), places) for tenant, places in mine.items()]
        if rest is not None:
            parts.append((self.base(x[rest]), rest))
        y: Tensor = parts[0][0].new_empty(x.shape[0], *parts[0][0].shape[1:])
        for part, places in parts:
            y[places] = part
        return y


class RoutedBlock:
    """The hook that runs the tenants' bottlenecks behind a block."""

    def __init__(self, block: nn.Module, router: Router) -> None:
        """Hook into a block."""
        self._router, self._nets = router, Stack()
        block.register_forward_hook(self._after)

    def put(self, tenant: int, own: Own, name: str) -> None:
        """Add a tenant's bottleneck behind this block."""
        if name in own.nets:
            net = own.nets[name]
            self._nets.put(tenant, (net.down, net.down_bias, net.up, net.up_bias))

    def remove(self, tenant: int) -> None:
        """Forget a tenant."""
        self._nets.remove(tenant)

    def _after(self, _block: nn.Module, _inputs: Any, output: Any) -> Any:
        nets = self._nets.gather(self._router.rows.tenants)
        if nets is None:
            return output
        if isinstance(output, tuple):
            return (self._added(output[0], *nets), *output[1:])
        return self._added(output, *nets)

    @staticmethod
    def _added(hidden: Tensor, down: Tensor, a: Tensor, up: Tensor, b: Tensor) -> Tensor:
        inner = torch.relu(torch.baddbmm(a[:, None], hidden, down.transpose(1, 2)))
        added = torch.baddbmm(b[:, None], inner, up.transpose(1, 2))
        return hidden + added


class Router:
    """A full model in memory, and the tenants in it."""

    def __init__(self, model: PreTrainedModel, arch: Architecture) -> None:
        """Take a model; none of its blocks is changed until a tenant has something of its own."""
        self.model, self.arch = model, arch
        self.rows = Rows((), model.device)
        self._routed: dict[str, RoutedModule | RoutedBlock] = {}
        self._modules: dict[int, set[str]] = {}

    @property
    def tenants(self) -> frozenset[int]:
        """Numbers of the tenants that rows may be of."""
        return frozenset(self._modules) | {BASE}

    def put(self, tenant: int, own: Own) -> None:
        """Add a tenant, whose tensors are on the model's device and in its dtype.

        Raises:
            FamilyError: A module is none that maps rows one by one.
        """
        for name in sorted(own.modules - set(self._routed)):
            self._routed[name] = self._route(name)
        for name in own.modules:
            self._routed[name].put(tenant, own, name)
        self._modules[tenant] = own.modules

    def remove(self, tenant: int) -> None:
        """Forget a tenant, of which no row may be left."""
        for name in self._modules.pop(tenant, ()):
            self._routed[name].remove(tenant)

    def expect(self, tenants: Sequence[int]) -> None:
        """Say whose rows the next forward is of."""
        self.rows = Rows(tenants, self.model.device)

    def _route(self, name: str) -> RoutedModule | RoutedBlock:
        module = self.model.get_submodule(name)
        if any(module is block for block in get_blocks(self.model, self.arch)):
            return RoutedBlock(module, self)
        check_row_wise(name, module)
        routed = RoutedModule(module, self)
        parent, _, own_name = name.rpartition(".")
        setattr(self.model.get_submodule(parent), own_name, routed)
        return routed


def maps_rows(module: nn.Module) -> bool:
    """Return whether a module is known to map rows of a batch one by one, with weights."""
    kind = type(module).__name__
    return "" in linear_layers(module) or kind.endswith(("RMSNorm", "LayerNorm"))


def check_row_wise(name: str, module: nn.Module) -> None:
    """Refuse a module of which it is not known that it maps rows of a batch one by one."""
    if not maps_rows(module):
        raise FamilyError(
            f"{name} is a {type(module).__name__}, which cannot be computed row by row with "
            "weights of several tenants; serve the plugged-in model of this adapter by itself"
        )


def _with(module: nn.Module, **parameters: Tensor) -> nn.Module:
    """Return a copy of a module that shares everything with it but some parameters."""
    other = copy.copy(module)
    changed = {n: nn.Parameter(t, requires_grad=False) for n, t in parameters.items()}
    other._parameters = {**module._parameters, **changed}
    return other


def _beside(bias: Tensor, y: Tensor) -> Tensor:
    """Return a bias of each row, ``(B, out)``, shaped to be added to ``(B, ..., out)``."""
    return bias.view(bias.shape[0], *(1,) * (y.ndim - 2), bias.shape[-1])
