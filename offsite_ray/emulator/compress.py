# SPDX-License-Identifier: Apache-2.0
"""Compress: make an emulator bundle out of a full model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.architectures import Notice, kept_config
from offsite_ray.bundle import (
    DTYPE_NAMES,
    Manifest,
    ModelFacts,
    TensorDirectory,
    TensorSpec,
    atomic_directory,
    check_free,
    fingerprint,
    new_hasher,
    tensor_bytes,
    write_manifest,
    write_model,
)
from offsite_ray.compression import Compression, compression_method
from offsite_ray.emulator.choosing import ChosenBlocks, choose_blocks
from offsite_ray.emulator.companions import refuse_bottlenecks, write_companions
from offsite_ray.full_model import FullModel, check_by_example, open_full_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from offsite_ray.config import CompressConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressResult:
    """What ``compress`` made."""

    out: str
    id: str
    plan: str
    adapter: tuple[int, ...]
    emulator: tuple[int, ...]
    num_blocks: int
    bundle_bytes: int
    full_model_bytes: int
    seconds: float


def compress(config: CompressConfig, notice: Notice | None = None) -> CompressResult:
    """Make an emulator bundle out of a full model.

    Args:
        config: What to make of which model.
        notice: Told what is unusual but not wrong.

    Raises:
        OffsiteError: The model, the plan or a method cannot be used; nothing is left behind.
    """
    start = time.perf_counter()
    out = Path(config.out)
    check_free(out)
    compression = compression_method(config.compress)
    full = open_full_model(config.model, config.blocks, notice)
    refuse_bottlenecks(full.path)
    chosen = choose_blocks(full, config, notice)
    plan = chosen.plan
    if full.arch.recognised != "table":
        check_by_example(full)
    recipe = {
        "selection": {"method": config.select, "seed": config.seed, **chosen.recipe},
        "compression": {"method": compression.name, "seed": config.seed},
        "distillation": None,
    }
    manifest = _write_bundle(full, chosen, compression, config.seed, out, recipe, start)
    return CompressResult(
        out=str(out),
        id=manifest.id,
        plan=plan.short,
        adapter=plan.adapter,
        emulator=plan.emulator,
        num_blocks=plan.num_blocks,
        bundle_bytes=manifest.measured["bundle_bytes"],
        full_model_bytes=manifest.measured["full_model_bytes"],
        seconds=time.perf_counter() - start,
    )


def _write_bundle(
    full: FullModel,
    chosen: ChosenBlocks,
    compression: Compression,
    seed: int,
    out: Path,
    recipe: Mapping[str, Any],
    start: float,
) -> Manifest:
    carried: dict[str, str] = {}
    tensors = bundle_tensors(full, chosen, compression, seed, carried)
    with atomic_directory(out) as tmp:
        files = write_model(tmp, tensors)
        config = kept_config(full.config, full.arch, chosen.stored)
        files |= write_companions(full.path, tmp, config)
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
            dtypes={"stored": stored_dtypes(full.weights)},
            measured={
                "seconds": time.perf_counter() - start,
                "bundle_bytes": sum(spec.nbytes for spec in tensors),
                "full_model_bytes": sum(i.nbytes for i in full.weights.tensors.values()),
            },
        )
        return write_manifest(tmp, manifest)


def bundle_tensors(
    full: FullModel,
    chosen: ChosenBlocks,
    compression: Compression,
    seed: int,
    carried: dict[str, str],
) -> list[TensorSpec]:
    """Return what the bundle holds: tensors outside the blocks, and those of the kept blocks.

    Args:
        full: The full model.
        chosen: Which blocks are kept, and what stands in the place of each.
        compression: What becomes of the emulator blocks.
        seed: Of the compression.
        carried: Gets the digest of each tensor of the full model, by its name there, as the tensor
            is read to be written.
    """
    emulated = [index in chosen.plan.emulator for index in chosen.plan.kept]
    found = []
    for name, info in full.weights.tensors.items():
        index = full.arch.block_of(name)
        places = [place for place, stored in enumerate(chosen.stored) if stored == index]
        for place in [None] if index is None else places:
            changed = compression.apply is not None and place is not None and emulated[place]
            found.append(
                TensorSpec(
                    name=name if place is None else full.arch.rename(name, place),
                    dtype=info.dtype,
                    shape=info.shape,
                    pieces=_pieces(full, name, compression if changed else None, seed, carried),
                )
            )
    return found


def _pieces(
    full: FullModel, name: str, compression: Compression | None, seed: int, carried: dict[str, str]
) -> Callable[[], Iterator[memoryview]]:
    def pieces() -> Iterator[memoryview]:
        hasher = new_hasher()
        for piece in full.weights.pieces(name):
            hasher.update(piece)
            if compression is None:
                yield piece
        carried[name] = hasher.hexdigest()
        if compression is not None and compression.apply is not None:
            yield tensor_bytes(compression.apply(name, full.weights.read(name), seed))

    return pieces


def stored_dtypes(weights: TensorDirectory) -> list[str]:
    """Return the dtypes of a model's tensors, as torch names them."""
    by_name = {name: str(dtype).removeprefix("torch.") for dtype, name in DTYPE_NAMES.items()}
    return sorted({by_name[info.dtype] for info in weights.tensors.values()})
