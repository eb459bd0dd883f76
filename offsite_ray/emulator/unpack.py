# SPDX-License-Identifier: Apache-2.0
"""Unpack: write a packed bundle as the stock model that it stands for."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offsite_ray.architectures import config_values
from offsite_ray.bundle import PackedDirectory, write_manifest
from offsite_ray.emulator.bundle import open_bundle
from offsite_ray.emulator.companions import write_companions
from offsite_ray.emulator.compress import dtypes_of
from offsite_ray.emulator.packing import as_read, write_config, write_weights
from offsite_ray.errors import BundleError
from offsite_ray.storage import check_untaken, published
from offsite_ray.uris import shown

if TYPE_CHECKING:
    from offsite_ray.config import UnpackConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpackResult:
    """What ``unpack`` made."""

    out: str
    id: str
    num_unpacked: int
    """Tensors that were packed."""
    packed_bytes: int
    bundle_bytes: int
    seconds: float


def unpack(config: UnpackConfig) -> UnpackResult:
    """Write a packed emulator bundle anew, so that stock transformers loads it.

    It computes what the packed one does, bit for bit, but is another bundle: an adapter belongs to
    the one that it was trained against.

    Raises:
        BundleError: It is no emulator bundle, or nothing in it is packed.
    """
    start = time.perf_counter()
    check_untaken(config.out)
    bundle = open_bundle(config.bundle)
    weights = bundle.weights
    if not isinstance(weights, PackedDirectory):
        raise BundleError(
            f"nothing in {shown(config.bundle)} is packed: stock transformers loads it as is"
        )
    specs = [as_read(weights, name) for name in weights.tensors]
    with published(config.out) as tmp:
        files = write_weights(tmp, specs, {})
        files |= write_companions(bundle.path, tmp, None)
        files |= write_config(tmp, config_values(bundle.path)["base_config"])
        manifest = dataclasses.replace(
            bundle.manifest,
            files=files,
            recipe={**bundle.manifest.recipe, "unpack": {"bundle": bundle.manifest.id}},
            dtypes=dtypes_of(specs, {}),
            measured={**bundle.manifest.measured, "bundle_bytes": sum(s.nbytes for s in specs)},
            created="",
        )
        manifest = write_manifest(tmp, manifest)
    return UnpackResult(
        out=shown(config.out),
        id=manifest.id,
        num_unpacked=len(weights.packed),
        packed_bytes=weights.nbytes,
        bundle_bytes=manifest.measured["bundle_bytes"],
        seconds=time.perf_counter() - start,
    )
