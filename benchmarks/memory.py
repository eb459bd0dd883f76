# SPDX-License-Identifier: Apache-2.0
"""What a process has in memory, or on its device."""

from __future__ import annotations

from pathlib import Path

import torch


def memory(device: torch.device, *, peak: bool) -> int:
    """Return the bytes in use: now, or the most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        raise SystemExit("memory of a process is read from /proc, which only Linux has")
    # Unlike getrusage, of this program alone: not of the one that started it.
    lines = dict(line.split(":", 1) for line in status.read_text("ascii").splitlines())
    return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024
