# SPDX-License-Identifier: Apache-2.0
"""What is known of the device that trains: memory in use, and its peak of arithmetic."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_STANDS_FOR: ContextVar[str | None] = ContextVar("stands_for", default=None)

PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "V100": 125.0,
}
"""Part of a GPU's name to its dense half-precision peak, as its data sheet gives it (bf16; the V100
has fp16 alone)."""


def peak_tflops(device: torch.device) -> float | None:
    """Return the half-precision peak of a device in 10^12 operations a second, if known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far: allocated on a GPU, resident in this process else."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back() -> None:
    """Return memory that is free to the system, which the C library would keep for this process."""
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def device_type(tensor: torch.Tensor) -> str:
    """Return the type of a tensor's device; in a rehearsal, of the one that it stands for."""
    return _STANDS_FOR.get() or tensor.device.type


@contextlib.contextmanager
def standing_for(device: str) -> Iterator[None]:
    """Let tensors be taken for those of a device, ``cpu`` or ``cuda``."""
    token = _STANDS_FOR.set(device)
    try:
        yield
    finally:
        _STANDS_FOR.reset(token)
