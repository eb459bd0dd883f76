# SPDX-License-Identifier: Apache-2.0
"""Compress: make an emulator bundle out of a full model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offsite_ray.architectures import Notice, in_full, kept_config, linear_weights
from offsite_ray.architectures.packed import NEEDS
from offsite_ray.bundle import (
    DTYPE_NAMES,
    Manifest,
    ModelFacts,
    TensorSpec,
    fingerprint,
    lazy_spec,
    new_hasher,
    write_manifest,
)
from offsite_ray.compression import GROUP_SIZE, Compression, PackedTensor, parse_compression
from offsite_ray.emulator.bundle import rounded
from offsite_ray.emulator.choosing import ChosenBlocks, choose_blocks
from offsite_ray.emulator.companions import refuse_bottlenecks, write_companions
from offsite_ray.emulator.matrices import MatrixToCompress
from offsite_ray.emulator.packing import wrap_config, write_weights
from offsite_ray.emulator.statistics import Statistics, check_text, measure
from offsite_ray.full_model import FullModel, check_by_example, open_full_model
from offsite_ray.storage import check_untaken, published
from offsite_ray.uris import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor

    from offsite_ray.config import CompressConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressResult:
    """What ``compress`` made."""

    out: str
    id: str
    plan: str
    select: str
    """Selection method."""
    compress: str
    """Compression method."""
    adapter: tuple[int, ...]
    emulator: tuple[int, ...]
    copies_of: tuple[int, ...] | None
    """Of each block of the emulator model, which of the full model it is; None: itself."""
    harmonizers: tuple[int, ...]
    """Blocks in whose place harmonizers stand."""
    num_blocks: int
    bundle_bytes: int
    full_model_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a bundle is made of."""

    full: FullModel
    chosen: ChosenBlocks
    """Which blocks are kept, and what stands in the place of each."""
    compression: Compression
    """What becomes of the matrices of the emulator blocks."""
    matrices: Mapping[str, bool]
    """Names of the matrices to compress, and whether each is stored as ``(in, out)``."""
    statistics: Statistics


def compress(config: CompressConfig, notice: Notice | None = None) -> CompressResult:
    """Make an emulator bundle out of a full model.

    Args:
        config: What to make of which model.
        notice: Told what is unusual but not wrong.

    Raises:
        OffsiteError: The model, the plan or a method cannot be used; nothing is left behind.
    """
    start = time.perf_counter()
    check_untaken(config.out)
    compression = parse_compression(config.compress)
    full = open_full_model(config.model, config.blocks, notice)
    refuse_bottlenecks(full.path)
    check_text(compression, config)
    chosen = choose_blocks(full, config, notice)
    plan = chosen.plan
    if full.arch.recognised != "table":
        check_by_example(full)
    names = full.weights.tensors
    matrices = linear_weights(full.config, full.arch, names) if compression.steps else {}
    statistics = measure(full, chosen, compression, matrices, config, notice)
    recipe = {
        "selection": {"method": chosen.method, "seed": config.seed, **chosen.recipe},
        "compression": {**compression.recipe(), **statistics.recipe},
        "distillation": None,
    }
    parts = Parts(
        full=full,
        chosen=chosen,
        compression=compression,
        matrices=matrices,
        statistics=statistics,
    )
    manifest = _write_bundle(parts, config.out, recipe, start)
    if "packed" in manifest.dtypes and notice is not None:
        notice(NEEDS)
    return CompressResult(
        out=shown(config.out),
        id=manifest.id,
        plan=plan.short,
        select=chosen.method,
        compress=compression.text,
        adapter=plan.adapter,
        emulator=plan.emulator,
        copies_of=None if chosen.stored == plan.kept else chosen.stored,
        harmonizers=tuple(sorted(chosen.replaced)),
        num_blocks=plan.num_blocks,
        bundle_bytes=manifest.measured["bundle_bytes"],
        full_model_bytes=manifest.measured["full_model_bytes"],
        seconds=time.perf_counter() - start,
    )


def _write_bundle(parts: Parts, out: str, recipe: Mapping[str, Any], start: float) -> Manifest:
    full, chosen = parts.full, parts.chosen
    carried: dict[str, str] = {}
    tensors, packed = bundle_tensors(parts, carried)
    with published(out) as tmp:
        files = write_weights(tmp, tensors, packed)
        config = kept_config(full.config, full.arch, chosen.stored)
        files |= write_companions(full.path, tmp, config)
        files |= wrap_config(tmp, packed)
        manifest = Manifest(
            kind="emulator_bundle",
            model=ModelFacts(
                family=full.arch.family.model_type,
                architecture=full.arch.class_name,
                blocks=full.arch.family.blocks,
                recognised=full.arch.recognised,
            ),
            plan=chosen.plan,
            full_model=fingerprint(full.path, full.weights, carried),
            files=files,
            recipe=recipe,
            dtypes=dtypes_of(tensors, packed),
            measured={
                "seconds": time.perf_counter() - start,
                "bundle_bytes": sum(spec.nbytes for spec in tensors),
                "full_model_bytes": full.weights.nbytes,
            },
        )
        return write_manifest(tmp, manifest)


def bundle_tensors(
    parts: Parts, carried: dict[str, str]
) -> tuple[list[TensorSpec], dict[str, PackedTensor]]:
    """Return what the bundle holds: tensors outside the blocks, and those of the kept blocks.

    Args:
        parts: What the bundle is made of.
        carried: Gets the digest of each tensor of the full model, by its name there, as the tensor
            is read to be written.

    Returns:
        The tensors, and of those that are packed how, by name in the bundle.

    Raises:
        IntegrityError: A matrix is stored in a dtype that cannot be compressed.
    """
    full, chosen = parts.full, parts.chosen
    emulated = [index in chosen.plan.emulator for index in chosen.plan.kept]
    found: list[TensorSpec] = []
    packed: dict[str, PackedTensor] = {}
    for name, info in full.weights.tensors.items():
        index = full.arch.block_of(name)
        places = [place for place, stored in enumerate(chosen.stored) if stored == index]
        for place in [None] if index is None else places:
            own_name = name if place is None else full.arch.rename(name, place)
            if name in chosen.harmonizers:
                make = _harmonizer(full, name, chosen.harmonizers[name], carried)
                found.append(lazy_spec(own_name, info.dtype, info.shape, make))
                continue
            if place is None or not emulated[place] or name not in parts.matrices:
                pieces = _pieces(full, name, carried)
                found.append(
                    TensorSpec(name=own_name, dtype=info.dtype, shape=info.shape, pieces=pieces)
                )
                continue
            matrix = MatrixToCompress(
                full=full,
                name=name,
                transposed=parts.matrices[name],
                compression=parts.compression,
                statistics=parts.statistics,
                carried=carried,
            )
            matrix.check()
            found += matrix.specs(own_name)
            if (how := matrix.packed()) is not None:
                packed[own_name] = how
    return found, packed


def _pieces(
    full: FullModel, name: str, carried: dict[str, str]
) -> Callable[[], Iterator[memoryview]]:
    def pieces() -> Iterator[memoryview]:
        hasher = new_hasher()
        for piece in full.weights.pieces(name):
            hasher.update(piece)
            yield piece
        carried[name] = hasher.hexdigest()

    return pieces


def _harmonizer(
    full: FullModel, name: str, live: Tensor, carried: dict[str, str]
) -> Callable[[], Tensor]:
    def tensor() -> Tensor:
        for _ in _pieces(full, name, carried)():
            pass  # read for its digest
        info = full.weights.tensors[name]
        return rounded(name, in_full(live, info.shape), info.dtype)()

    return tensor


def dtypes_of(tensors: Iterable[TensorSpec], packed: Mapping[str, PackedTensor]) -> dict[str, Any]:
    """Return what a manifest says of how tensors are stored."""
    by_name = {name: str(dtype).removeprefix("torch.") for dtype, name in DTYPE_NAMES.items()}
    dtypes: dict[str, Any] = {"stored": sorted({by_name[spec.dtype] for spec in tensors})}
    if packed:
        dtypes["packed"] = {
            "bits": next(tensor.bits for tensor in packed.values()),
            "group_size": GROUP_SIZE,
            "num_tensors": len(packed),
            "needs": NEEDS,
        }
    return dtypes
