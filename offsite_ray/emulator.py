# SPDX-License-Identifier: Apache-2.0
"""Emulator bundles: made of a full model, opened, and written again after distillation.

Everything happens on safetensors on disk, one tensor at a time and under the names that the full
model's own checkpoint has, with the index of the block changed. So the full model is never held in
memory, and what transformers does while it loads (fusing experts, adding a prefix) applies to the
bundle as to the model.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.architectures import (
    Architecture,
    Notice,
    block_parameters,
    check_separable,
    kept_config,
    load_config,
    load_model,
    model_class,
    model_directory,
    quiet_transformers,
    resolve_architecture,
)
from offsite_ray.bundle import (
    DTYPE_NAMES,
    Manifest,
    ModelFacts,
    TensorDirectory,
    TensorSpec,
    atomic_directory,
    check_files,
    check_free,
    check_kind,
    difference,
    digest_file,
    fingerprint,
    read_manifest,
    rewrite_model,
    write_manifest,
    write_model,
)
from offsite_ray.bundle.shards import tensor_bytes
from offsite_ray.compression import Compression, compression_method
from offsite_ray.errors import FamilyError, IntegrityError, PlugInError
from offsite_ray.selection import selection_method
from offsite_ray.split import SplitPlan, parse_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from transformers.configuration_utils import PretrainedConfig

    from offsite_ray.config import CompressConfig

COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files beside the weights that belong to a model: its tokenizer, image processor, templates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FullModel:
    """A full model on disk: its parts without its weights in memory."""

    path: Path
    config: PretrainedConfig
    arch: Architecture
    weights: TensorDirectory


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

    def full_name(self, name: str) -> str:
        """Return the name in the full model of a tensor of the bundle."""
        index = self.arch.block_of(name)
        return name if index is None else self.arch.rename(name, self.plan.kept[index])

    def own_name(self, name: str) -> str:
        """Return the name in the bundle of a tensor of the full model (of a kept block)."""
        index = self.arch.block_of(name)
        return name if index is None else self.arch.rename(name, self.plan.kept.index(index))


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


def open_full_model(
    name: str | Path, blocks: str | None = None, notice: Notice | None = None
) -> FullModel:
    """Return the full model of a directory (or of the hub), its weights looked at, not loaded.

    Raises:
        StorageError: There is none.
        FamilyError: Its family is in no table and its structure is ambiguous.
        IntegrityError: Its weights do not hold the blocks that its config promises.
    """
    path = model_directory(name)
    config = load_config(path)
    arch = resolve_architecture(config, blocks, notice)
    weights = TensorDirectory.of_model(path)
    _check_blocks(path, arch, weights)
    return FullModel(path=path, config=config, arch=arch, weights=weights)


def _check_blocks(path: Path, arch: Architecture, weights: TensorDirectory) -> None:
    """Check that the weights hold every block of the config and no other."""
    found = {arch.block_of(name) for name in weights.tensors} - {None}
    expected = set(range(arch.num_blocks))
    if odd := sorted(index for index in expected ^ found if index is not None):
        state = "lack" if odd[0] in expected else "hold"
        raise IntegrityError(
            f"the weights in {path} {state} block {odd[0]}, and its config.json has "
            f"{arch.num_blocks} blocks"
        )


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
    plan = parse_plan(config.plan, full.arch.num_blocks, selection_method(config.select))
    check_separable(full.config, full.arch, plan)
    if full.arch.recognised != "table":
        check_by_example(full)
    recipe = {
        "selection": {"method": config.select, "seed": config.seed},
        "compression": {"method": compression.name, "seed": config.seed},
        "distillation": None,
    }
    manifest = _write_bundle(full, plan, compression, config.seed, out, recipe, start)
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
    plan: SplitPlan,
    compression: Compression,
    seed: int,
    out: Path,
    recipe: Mapping[str, Any],
    start: float,
) -> Manifest:
    tensors = bundle_tensors(full, plan, compression, seed)
    kept = set(plan.kept)
    carried = [n for n in full.weights.tensors if full.arch.block_of(n) in kept | {None}]
    with atomic_directory(out) as tmp:
        files = write_model(tmp, tensors)
        files |= write_companions(full.path, tmp, kept_config(full.config, full.arch, plan.kept))
        manifest = Manifest(
            kind="emulator_bundle",
            model=ModelFacts(
                family=full.arch.family.model_type,
                architecture=full.arch.class_name,
                blocks=full.arch.family.blocks,
                recognised=full.arch.recognised,
            ),
            plan=plan,
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
    full: FullModel, plan: SplitPlan, compression: Compression, seed: int
) -> list[TensorSpec]:
    """Return what the bundle holds: tensors outside the blocks, and those of the kept blocks."""
    position = {index: j for j, index in enumerate(plan.kept)}
    emulator = set(plan.emulator)
    found = []
    for name, info in full.weights.tensors.items():
        index = full.arch.block_of(name)
        if index is not None and index not in position:
            continue
        compressed = compression.apply is not None and index in emulator
        found.append(
            TensorSpec(
                name=name if index is None else full.arch.rename(name, position[index]),
                dtype=info.dtype,
                shape=info.shape,
                data=_data(full, name, compression if compressed else None, seed),
            )
        )
    return found


def _data(
    full: FullModel, name: str, compression: Compression | None, seed: int
) -> Callable[[], bytes | memoryview]:
    if compression is None or compression.apply is None:
        return lambda: full.weights.data(name)
    apply = compression.apply
    return lambda: tensor_bytes(apply(name, full.weights.read(name), seed))


def write_companions(source: Path, target: Path, config: PretrainedConfig | None) -> dict[str, str]:
    """Copy tokenizer and templates; write the config (None: copy it too); return digests."""
    names = [name for name in COMPANION_FILES if (source / name).is_file()]
    if config is None:
        names.append("config.json")
    else:
        (target / "config.json").write_text(config_text(source, config), encoding="utf-8")
    for name in names:
        shutil.copyfile(source / name, target / name)
    return {name: digest_file(target / name) for name in dict.fromkeys((*names, "config.json"))}


def config_text(source: Path, config: PretrainedConfig) -> str:
    """Return ``config.json`` of a changed config, with the class and dtype of the original's."""
    values = json.loads(config.to_json_string(use_diff=False))
    original = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for key in ("architectures", "dtype", "torch_dtype"):
        if key in original:
            values[key] = original[key]
    values.pop("_name_or_path", None)
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def stored_dtypes(weights: TensorDirectory) -> list[str]:
    """Return the dtypes of a model's tensors, as torch names them."""
    by_name = {name: str(dtype).removeprefix("torch.") for dtype, name in DTYPE_NAMES.items()}
    return sorted({by_name[info.dtype] for info in weights.tensors.values()})


@torch.no_grad()
def check_by_example(full: FullModel) -> None:
    """Check invariants 1 and 2 on a few tokens, for a family that is in no table.

    Raises:
        FamilyError: The model, cut and put together again, computes something else.
    """
    model = load_model(full.path, auto_class=full.arch.family.auto_class)
    tokens = (torch.arange(12) * 7 % full.config.vocab_size)[None]
    expected = model(tokens).logits
    every = range(full.arch.num_blocks)
    config = kept_config(full.config, full.arch, every)
    state = {name: full.weights.read(name) for name in full.weights.tensors}
    with quiet_transformers():
        rebuilt = model_class(config).from_pretrained(
            None, config=config, state_dict=state, dtype=model.dtype
        )
    rebuilt.eval()
    if not torch.equal(rebuilt(tokens).logits, expected):
        raise FamilyError(
            f"model type {full.config.model_type!r} does not compute the same once its blocks are "
            "cut and put together again; it needs a row of its own in the table of families"
        )
    blocks = {n: t for n, t in state.items() if full.arch.block_of(n) is not None}
    rebuilt.load_state_dict(block_parameters(full.config, full.arch, blocks), strict=False)
    if not torch.equal(rebuilt(tokens).logits, expected):
        raise FamilyError(
            f"model type {full.config.model_type!r} does not compute the same with its own blocks "
            "plugged in; it needs a row of its own in the table of families"
        )


def open_bundle(directory: str | Path) -> EmulatorBundle:
    """Return an emulator bundle, every file of it verified.

    Raises:
        BundleError: It is no emulator bundle.
        IntegrityError: It is not whole, was altered, or contradicts itself.
    """
    path = Path(directory)
    manifest = read_manifest(path)
    check_kind(path, manifest, "emulator_bundle")
    check_files(path, manifest)
    config = load_config(path)
    arch = resolve_architecture(config, blocks_path(manifest))
    weights = TensorDirectory.of_model(path)
    bundle = EmulatorBundle(path=path, manifest=manifest, config=config, arch=arch, weights=weights)
    if config.model_type != manifest.model.family or arch.num_blocks != len(manifest.plan.kept):
        raise IntegrityError(
            f"{path}: config.json is of a {config.model_type} of {arch.num_blocks} blocks, the "
            f"manifest of a {manifest.model.family} of {len(manifest.plan.kept)}"
        )
    _check_blocks(path, arch, weights)
    odd = {bundle.full_name(n) for n in weights.tensors} ^ set(manifest.full_model.carried)
    if odd:
        raise IntegrityError(f"{path}: tensor {min(odd)!r} is missing or not in the manifest")
    return bundle


def check_fits(path: Path, manifest: Manifest, full: FullModel) -> None:
    """Check that a bundle was made for this full model.

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
    known = [name for name in expected.carried if name in full.weights.tensors]
    if problem := difference(expected, fingerprint(full.path, full.weights, known)):
        raise PlugInError(f"{full.path} is not the model that {path} was made for: {problem}")


def blocks_path(manifest: Manifest) -> str | None:
    """Return the ``--blocks`` that a bundle was made with; None for a family in the table."""
    return None if manifest.model.recognised == "table" else manifest.model.blocks


def write_distilled(
    bundle: EmulatorBundle,
    tensors: Mapping[str, Tensor],
    out: Path,
    recipe: Mapping[str, Any],
    measured: Mapping[str, Any],
) -> Manifest:
    """Write a bundle again with trained emulator blocks, in the dtype that they had.

    Args:
        bundle: The bundle that was trained.
        tensors: Name on disk in the bundle to trained tensor.
        out: Directory to write.
        recipe: How it was distilled.
        measured: Figures of the run.
    """
    replacements = {
        name: rounded(name, tensor, bundle.weights.tensors[name].dtype)
        for name, tensor in tensors.items()
    }
    with atomic_directory(out) as tmp:
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
    from offsite_ray.bundle import TORCH_DTYPES

    def stored() -> Tensor:
        result = tensor.detach().cpu().to(TORCH_DTYPES[dtype])
        if not bool(torch.isfinite(result).all()):
            raise IntegrityError(
                f"tensor {name!r} holds a value that is not finite in {dtype}; nothing was written"
            )
        return result

    return stored
