# SPDX-License-Identifier: Apache-2.0
"""Emulator bundles: opened, checked against a full model, written again after distillation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offsite_ray.architectures import Architecture, load_config, resolve_architecture
from offsite_ray.bundle import (
    TORCH_DTYPES,
    Manifest,
    PackedDirectory,
    TensorDirectory,
    all_finite,
    difference,
    digests,
    fingerprint,
    open_weights,
    read_verified,
    rewrite_model,
    write_manifest,
    write_packed,
)
from offsite_ray.emulator.companions import belongs_to_bundle, write_companions
from offsite_ray.emulator.packing import packed_again
from offsite_ray.errors import IntegrityError, PlugInError
from offsite_ray.full_model import FullModel, check_block_count
from offsite_ray.storage import fetched, published

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers.configuration_utils import PretrainedConfig

    from offsite_ray.split import SplitPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class EmulatorBundle:
    """An emulator bundle that was opened and verified."""

    path: Path
    manifest: Manifest
    config: PretrainedConfig
    arch: Architecture
    """Of the emulator model: its number of blocks is that of the plan's kept ones."""
    weights: TensorDirectory

    @property
    def plan(self) -> SplitPlan:
        """The split plan, in absolute indices of the full model."""
        return self.manifest.plan

    @property
    def stored_blocks(self) -> tuple[int, ...]:
        """Block of the full model that each block is: itself, or the one that it copies."""
        return tuple(self.manifest.recipe.get("selection", {}).get("copies_of", self.plan.kept))

    def full_name(self, name: str) -> str:
        """Return the name in the full model of a tensor of the bundle."""
        index = self.arch.block_of(name)
        return name if index is None else self.arch.rename(name, self.stored_blocks[index])

    def own_name(self, name: str) -> str:
        """Return the name in the bundle of a tensor of the full model (of a kept block)."""
        index = self.arch.block_of(name)
        return name if index is None else self.arch.rename(name, self.plan.kept.index(index))


def open_bundle(directory: str | Path) -> EmulatorBundle:
    """Return the emulator bundle of a directory or a URI, every file of it verified.

    Raises:
        BundleError: It is no emulator bundle.
        IntegrityError: It is not whole, was altered, or contradicts itself.
    """
    path = fetched(directory)
    manifest = read_verified(path, "emulator_bundle")
    if foreign := [name for name in manifest.files if not belongs_to_bundle(name)]:
        raise IntegrityError(f"{path} holds {foreign[0]!r}, which is no part of an emulator bundle")
    config = load_config(path)
    arch = resolve_architecture(config, blocks_path(manifest))
    weights = open_weights(path)
    unread = {name for name in manifest.files if name.endswith(".safetensors")}
    if unread := unread - {file.name for file in weights.files}:
        raise IntegrityError(f"{path} holds {min(unread)!r}, which is no part of its weights")
    bundle = EmulatorBundle(path=path, manifest=manifest, config=config, arch=arch, weights=weights)
    if config.model_type != manifest.model.family or arch.num_blocks != len(manifest.plan.kept):
        raise IntegrityError(
            f"{path}: config.json is of a {config.model_type} of {arch.num_blocks} blocks, the "
            f"manifest of a {manifest.model.family} of {len(manifest.plan.kept)}"
        )
    check_block_count(path, arch, weights)
    if len(bundle.stored_blocks) != len(manifest.plan.kept):
        raise IntegrityError(f"{path}: the manifest does not say of every block which it copies")
    odd = {bundle.full_name(n) for n in weights.tensors} ^ set(manifest.full_model.carried)
    if odd:
        raise IntegrityError(f"{path}: tensor {min(odd)!r} is missing or not in the manifest")
    return bundle


def check_fits(
    path: Path,
    manifest: Manifest,
    full: FullModel,
    files: Collection[Path] = (),
    *,
    from_memory: bool = False,
) -> dict[Path, str]:
    """Check that a bundle was made for this full model.

    Args:
        path: Of the bundle.
        manifest: Of the bundle.
        full: The full model.
        files: Files of the full model whose digests are wanted, since they are read anyway.
        from_memory: Read none of its files that was read before and not touched since.

    Returns:
        The digests of ``files``.

    Raises:
        PlugInError: Its family, its plan or its fingerprint is another's.
    """
    family = full.arch.family.model_type
    if manifest.model.family != family:
        raise PlugInError(f"{path} is for a {manifest.model.family}, {full.path} is a {family}")
    if manifest.plan.num_blocks != full.arch.num_blocks:
        raise PlugInError(
            f"{path} has a plan for {manifest.plan.num_blocks} blocks, {full.path} has "
            f"{full.arch.num_blocks}"
        )
    expected = manifest.full_model
    known = {n: digest for n, digest in expected.carried.items() if n in full.weights.tensors}
    # Another model is told apart by what takes no reading, before all that is carried is read.
    found = fingerprint(full.path, full.weights, known)
    problem = difference(expected, found)
    of_files: dict[Path, str] = {}
    if problem is None:
        carried, of_files = digests(full.weights, known, files, from_memory=from_memory)
        problem = difference(expected, dataclasses.replace(found, carried=carried))
    if problem is not None:
        raise PlugInError(f"{full.path} is not the model that {path} was made for: {problem}")
    return of_files


def blocks_path(manifest: Manifest) -> str | None:
    """Return the ``--blocks`` that a bundle was made with; None for a family in the table."""
    return None if manifest.model.recognised == "table" else manifest.model.blocks


def write_distilled(
    bundle: EmulatorBundle,
    tensors: Mapping[str, Tensor],
    out: str | Path,
    recipe: Mapping[str, Any],
    measured: Mapping[str, Any],
) -> Manifest:
    """Write a bundle again with trained emulator blocks, in the dtype that they had.

    Packed matrices are packed again: rounded to as many bits, with new scales.

    Args:
        bundle: The bundle that was trained.
        tensors: Name on disk in the bundle to trained tensor.
        out: Directory or URI to write.
        recipe: How it was distilled.
        measured: Figures of the run.
    """
    replacements = {
        name: rounded(name, tensor, bundle.weights.tensors[name].dtype)
        for name, tensor in tensors.items()
    }
    weights = bundle.weights
    with published(out) as tmp:
        if isinstance(weights, PackedDirectory):
            files = write_packed(tmp, packed_again(weights, replacements))
        else:
            files = rewrite_model(bundle.path, tmp, replacements)
        files |= write_companions(bundle.path, tmp, None)
        manifest = dataclasses.replace(
            bundle.manifest,
            files=files,
            recipe={**bundle.manifest.recipe, "distillation": dict(recipe)},
            measured={**bundle.manifest.measured, **measured},
            created="",
        )
        return write_manifest(tmp, manifest)


def rounded(name: str, tensor: Tensor, dtype: str) -> Callable[[], Tensor]:
    """Return what gives the tensor in a stored dtype, rounded to nearest.

    Raises:
        IntegrityError: A value is not finite, or beyond what the dtype holds.
    """

    def stored() -> Tensor:
        result = tensor.detach().cpu().to(TORCH_DTYPES[dtype])
        if not all_finite(result):
            raise IntegrityError(
                f"tensor {name!r} holds a value that is not finite in {dtype}; nothing was written"
            )
        return result

    return stored
