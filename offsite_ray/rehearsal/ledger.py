# SPDX-License-Identifier: Apache-2.0
"""A ledger of what tensors take: bytes as they come and go, and floating-point operations."""

from __future__ import annotations

import weakref
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

_LARGE = 32 * 2**20
"""Blocks of this size and above glibc takes from the system and gives back at once."""

_aten = torch.ops.aten

_ATTENTION = (
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_efficient_attention,
)
_ATTENTION_BACKWARD = (
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    _aten._scaled_dot_product_efficient_attention_backward,
)

_KEEPS_FLOAT32 = (
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward,
)
"""Kernels that sum the gradient of the queries in float32, in memory of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytes:
    """What a step has at most, beside the weights."""

    gradients: int = 0
    """Of trained parameters, when they and ``others`` together are the most."""
    others: int = 0
    """Then, whatever else: what the backward pass will read, what an operation needs for itself."""
    small_blocks: int = 0
    """The most at any time in tensors below 32 MiB: with a CPU's allocator they stay."""
    large_blocks: int = 0
    """The same for the other tensors."""

    @property
    def total(self) -> int:
        """Gradients and others."""
        return self.gradients + self.others


@dataclass(frozen=True, kw_only=True, slots=True)
class Operations:
    """Floating-point operations of matrix products and attention.

    A product of ``(m, k)`` with ``(k, n)`` is ``2 m k n``. Embedding look-ups, norms, activations
    and the optimizer count as nothing.
    """

    teacher: int = 0
    """Forward passes without gradient."""
    forward: int = 0
    recomputed: int = 0
    """Forward passes done again in the backward pass."""
    backward: int = 0

    @property
    def useful(self) -> int:
        """All but what is recomputed."""
        return self.teacher + self.forward + self.backward

    @property
    def total(self) -> int:
        """All that are executed."""
        return self.useful + self.recomputed


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps count of a step that runs inside it."""

    def __init__(self, module: nn.Module) -> None:
        """Take the module whose parameters and buffers are there already."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations = dict.fromkeys(("teacher", "forward", "recomputed", "backward"), 0)
        # Bytes in small and in large blocks.
        self._live = {"gradients": [0, 0], "others": [0, 0]}
        self._most, self._most_others = _Most(), _Most()
        self._kinds: dict[int, str] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            self._kinds[tensor.untyped_storage()._cdata] = "weights"
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    self._is_gradient
                )

    @property
    def most(self) -> Bytes:
        """What there is at most, with gradients."""
        return self._most.bytes()

    @property
    def most_others(self) -> Bytes:
        """What there is at most where gradients go elsewhere as they come."""
        return self._most_others.bytes()

    @property
    def operations(self) -> Operations:
        """What was counted."""
        return Operations(**self._operations)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do an operation and enter what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, torch.Tensor):
                self._enter(leaf.untyped_storage())
        kept = func._overloadpacket in _KEEPS_FLOAT32
        self._note(workspace=args[1].numel() * 4 if kept else 0)
        self._operations[_phase()] += _count(func, args, kwargs or {}, out)
        return out

    def _enter(self, storage: Any) -> None:
        if storage._cdata not in self._kinds:
            self._kinds[storage._cdata] = "others"
            self._add("others", storage.nbytes())
            weakref.finalize(storage, self._leave, storage._cdata, storage.nbytes())

    def _leave(self, key: int, nbytes: int) -> None:
        self._add(self._kinds.pop(key), -nbytes)

    def _is_gradient(self, parameter: Tensor) -> None:
        storage = parameter.grad.untyped_storage()  # type: ignore[union-attr]
        if self._kinds.get(storage._cdata) == "others":
            self._kinds[storage._cdata] = "gradients"
            self._add("others", -storage.nbytes())
            self._add("gradients", storage.nbytes())

    def _add(self, kind: str, nbytes: int) -> None:
        self._live[kind][abs(nbytes) >= _LARGE] += nbytes

    def _note(self, workspace: int) -> None:
        small, large = self._live["others"]
        large += workspace
        self._most_others.note(0, small + large, small, large)
        gradients = self._live["gradients"]
        self._most.note(sum(gradients), small + large, small + gradients[0], large + gradients[1])


@dataclass(slots=True)
class _Most:
    """The most that there was so far."""

    gradients: int = 0
    others: int = 0
    small_blocks: int = 0
    large_blocks: int = 0

    def note(self, gradients: int, others: int, small: int, large: int) -> None:
        """Take what there is now."""
        if gradients + others > self.gradients + self.others:
            self.gradients, self.others = gradients, others
        self.small_blocks = max(self.small_blocks, small)
        self.large_blocks = max(self.large_blocks, large)

    def bytes(self) -> Bytes:
        """Return it."""
        return Bytes(**asdict(self))


def _phase() -> str:
    """Return which part of a step an operation belongs to."""
    if torch._C._current_graph_task_id() == -1:  # no backward pass is under way
        return "forward" if torch.is_grad_enabled() else "teacher"
    return "recomputed" if torch.is_grad_enabled() else "backward"


def _count(func: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> int:
    """Return the operations of one call, 0 for what is no matrix product."""
    packet = func._overloadpacket
    if packet in _ATTENTION or packet in _ATTENTION_BACKWARD:
        names = (argument.name for argument in func._schema.arguments)
        passes = 1 if packet in _ATTENTION else 2
        return passes * _attention({**dict(zip(names, args, strict=False)), **kwargs})
    if packet == _aten._grouped_mm:  # each row with one expert's matrix
        return int(2 * args[0].numel() * args[1].shape[-1])
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _attention(given: Mapping[str, Any]) -> int:
    """Return the operations of queries with keys and of weights with values, ``(B, H, T, D)``."""
    batch, heads, num_queries, width = given["query"].shape
    # A token with those up to itself: (T + 1) / 2 on average.
    causal = given.get("is_causal", False)
    pairs = num_queries * (num_queries + 1) // 2 if causal else num_queries * given["key"].shape[2]
    return int(2 * batch * heads * pairs * (width + given["value"].shape[-1]))
