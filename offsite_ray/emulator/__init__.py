# SPDX-License-Identifier: Apache-2.0
"""Emulator bundles: made of a full model, opened, and written again after distillation.

Everything happens on safetensors on disk, one tensor at a time and under the names that the full
model's own checkpoint has, with the index of the block changed. So the full model is never held in
memory, and what transformers does while it loads (fusing experts, adding a prefix) applies to the
bundle as to the model.
"""

from offsite_ray.emulator.bundle import (
    EmulatorBundle,
    blocks_path,
    check_fits,
    open_bundle,
    rounded,
    write_distilled,
)
from offsite_ray.emulator.companions import refuse_bottlenecks, write_companions
from offsite_ray.emulator.compress import CompressResult, compress
from offsite_ray.emulator.statistics import looks_at_text
from offsite_ray.emulator.unpack import UnpackResult, unpack
from offsite_ray.full_model import FullModel, open_full_model

__all__ = [
    "CompressResult",
    "EmulatorBundle",
    "FullModel",
    "UnpackResult",
    "blocks_path",
    "check_fits",
    "compress",
    "looks_at_text",
    "open_bundle",
    "open_full_model",
    "refuse_bottlenecks",
    "rounded",
    "unpack",
    "write_companions",
    "write_distilled",
]
