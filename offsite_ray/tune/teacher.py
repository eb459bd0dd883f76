# SPDX-License-Identifier: Apache-2.0
"""The teacher's outputs, computed once for all distillations of a sweep that compare the same."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from offsite_ray.bundle import alone
from offsite_ray.data import open_prepared
from offsite_ray.distillation.cache import cache_task, ensure_cache, needed_ends
from offsite_ray.emulator import blocks_path, open_bundle, open_full_model
from offsite_ray.training import keeps_documents_apart
from offsite_ray.tune.folders import Folders

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_ray.config import DistillConfig
    from offsite_ray.distillation.cache import Fill


def cached_config(config: DistillConfig, root: Path, fill: Fill) -> DistillConfig:
    """Return the configuration of a distillation that reads the teacher's outputs.

    They are written if they are not there, by one job at a time. Where the losses need none, or the
    emulator keeps nothing of a run of blocks, the configuration is returned as it is.

    Args:
        config: Of a distillation whose data are prepared.
        root: Directory of the sweep.
        fill: Writes what is missing.
    """
    bundle = open_bundle(config.bundle)
    ends = needed_ends(bundle.plan, config)
    if not ends or any(not segment.kept for segment in bundle.plan.segments):
        return config
    name = "-".join(map(str, ("teacher", *ends)))
    directory = Folders(root).shared / name
    cached = dataclasses.replace(config, teacher_cache=str(directory))
    full = open_full_model(config.model, blocks_path(bundle.manifest))
    task = cache_task(
        full,
        bundle.plan,
        cached,
        open_prepared(config.data[0], full.path, full.config.vocab_size),
        blocks_path(bundle.manifest),
        use_positions=keeps_documents_apart(full.config, full.arch, full.weights),
    )
    with alone(directory.with_name(f".{name}.lock")):
        ensure_cache(task, cached, fill, lambda _: None)
    return cached
