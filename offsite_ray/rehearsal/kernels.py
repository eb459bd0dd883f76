# SPDX-License-Identifier: Apache-2.0
"""What a GPU does otherwise than a CPU, done on stand-ins for tensors of a GPU.

A torch without CUDA has no tensors of a GPU, not even empty ones that autograd takes. So a
rehearsal runs on stand-ins of the CPU, and what would differ is replaced while it does: attention,
and the functions that CUDA's autocast runs in float32.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import masking_utils

from offsite_ray.training.devices import standing_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

_IN_FLOAT32 = (
    "layer_norm",
    "softmax",
    "log_softmax",
    "cross_entropy",
    "nll_loss",
    "kl_div",
    "mse_loss",
    "softplus",
)
"""Functions of ``torch.nn.functional`` that CUDA's autocast runs in float32, where the CPU's does
not (torch, "CUDA Ops that can autocast to float32"): those that language models use."""


@contextlib.contextmanager
def kernels_of(device: str, *, packed: bool) -> Iterator[None]:
    """Let stand-ins be taken for tensors of a device, ``cpu`` or ``cuda``, and do as it does.

    Functions are replaced where callers look them up: a torch function mode would be off in the
    backward pass, which may recompute the forward pass.

    Args:
        device: The device.
        packed: Whether rows hold several documents. Positions say so, and these have no values.
    """
    others: dict[tuple[ModuleType, str], Callable[..., Any]] = {
        (functional, "grouped_mm"): _grouped_product
    }
    if device == "cuda":
        others |= _gpu_functions()
    if not packed:
        others[masking_utils, "find_packed_sequence_indices"] = lambda _: None
    own = {(module, name): getattr(module, name) for module, name in others}
    try:
        for (module, name), other in others.items():
            setattr(module, name, other)
        with standing_for(device):
            yield
    finally:
        for (module, name), function in own.items():
            setattr(module, name, function)


def _grouped_product(rows: Tensor, matrices: Tensor, **_: Any) -> Tensor:
    """Multiply all rows with one expert's matrix: of equal shape, and as many operations.

    The grouped product itself has no stand-in for float32; autocast leaves it alone.
    """
    with torch.autocast("cpu", enabled=False):
        return rows @ matrices[0]


def _gpu_functions() -> dict[tuple[ModuleType, str], Callable[..., Any]]:
    in_float32 = {(functional, n): _in_float32(getattr(functional, n)) for n in _IN_FLOAT32}
    return {(functional, "scaled_dot_product_attention"): _attention, **in_float32}


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return function(
                *map(_float32, args), **{name: _float32(value) for name, value in kwargs.items()}
            )

    return wrapped


def _float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Do what torch chooses on a GPU: flash attention, or the kernel that takes masks.

    FlashAttention: Dao, arXiv 2307.08691. It has no masks and no float32.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is None and query.dtype != torch.float32 and query.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention(  # type: ignore[no-any-return]
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    if attn_mask is not None:
        attn_mask = _additive(attn_mask, query)
    return torch.ops.aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """Return a mask as the kernel takes it: added to the scores, of every query head."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    return mask.to(query.dtype).expand(*query.shape[:-1], mask.shape[-1])
