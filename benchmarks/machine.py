# SPDX-License-Identifier: Apache-2.0
"""What a benchmark ran on; imports nothing heavy."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def commit() -> str | None:
    """Return the commit of the working tree; None outside git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def machine() -> dict[str, Any]:
    """Return the processor, the memory and the system."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    info = {name.strip(): value.strip() for name, value in pairs}
    return {
        "cpu": info.get("model name", platform.machine()),
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in info.get("flags", "").split()],
        "num_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }
