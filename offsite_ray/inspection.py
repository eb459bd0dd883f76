# SPDX-License-Identifier: Apache-2.0
"""Looking into a directory, and checking that it is whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from offsite_ray.adapter import AdapterBundle, open_adapter
from offsite_ray.architectures import (
    config_values,
    load_config,
    resolve_architecture,
)
from offsite_ray.architectures.bottleneck import BOTTLENECK_FILE
from offsite_ray.bundle import (
    MANIFEST,
    Kind,
    TensorDirectory,
    open_weights,
    read_manifest,
    read_verified,
)
from offsite_ray.data import check_files, open_prepared
from offsite_ray.data.manifest import read_data_manifest
from offsite_ray.emulator import (
    EmulatorBundle,
    blocks_path,
    check_fits,
    open_bundle,
    open_full_model,
)
from offsite_ray.finetuning.host import host_of_full_model
from offsite_ray.finetuning.methods import finetuning_method
from offsite_ray.finetuning.writing import check_plug_in
from offsite_ray.results import to_plain
from offsite_ray.storage import DATA_MANIFEST, fetched, model_at
from offsite_ray.uris import shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offsite_ray.bundle import Manifest
    from offsite_ray.config import VerifyConfig

_PREPARED: Literal["prepared_data"] = "prepared_data"
"""What stands for the kind of a bundle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyResult:
    """What was checked and found right."""

    verdict: str
    """In words, for people."""
    path: str
    kind: Kind | Literal["prepared_data"]
    id: str
    num_files: int
    """Files whose digest was checked."""
    num_tensors: int
    """Tensors whose place, shape and dtype were checked."""
    checked_against: str | None
    """Full model that it belongs to (data: by the tokenizer); None where none was given."""


def inspect_path(path: str | Path, blocks: str | None = None) -> dict[str, Any]:
    """Return what is in a directory or at a URI; nothing is verified but the manifest.

    Raises:
        StorageError: It is neither a bundle nor a model.
        IntegrityError: Its manifest was altered.
    """
    return {"path": shown(str(path)), **_inspected(fetched(path), blocks)}


def _inspected(directory: Path, blocks: str | None) -> dict[str, Any]:
    if (directory / DATA_MANIFEST).is_file():
        return _inspect_data(directory)
    if directory.is_dir() and not (directory / MANIFEST).is_file():
        return _inspect_model(directory, blocks)
    manifest = read_manifest(directory)
    return {
        "kind": manifest.kind,
        "id": manifest.id,
        "created": manifest.created,
        "tool": manifest.tool,
        "family": manifest.model.family,
        "architecture": manifest.model.architecture,
        "plan": manifest.plan.short,
        "num_blocks": manifest.plan.num_blocks,
        "adapter": list(manifest.plan.adapter),
        "emulator": list(manifest.plan.emulator),
        "recipe": to_plain(manifest.recipe),
        "dtypes": to_plain(manifest.dtypes),
        "trained_against": manifest.trained_against,
        **_sizes(_weights(directory, manifest)),
        "measured": to_plain(manifest.measured),
    }


def _inspect_data(directory: Path) -> dict[str, Any]:
    """Return what is in a directory of prepared data."""
    manifest = read_data_manifest(directory)
    known = {"kind": _PREPARED, "digest": manifest.digest}
    return {**known, **to_plain(manifest)}


def _inspect_model(directory: Path, blocks: str | None) -> dict[str, Any]:
    """Return what is in a full model's directory."""
    values = config_values(directory)
    config = load_config(directory)
    arch = resolve_architecture(config, blocks)
    return {
        "kind": "model",
        "family": values.get("model_type"),
        "architecture": arch.class_name,
        "num_blocks": arch.num_blocks,
        "blocks": arch.family.blocks,
        "recognised": arch.recognised,
        **_sizes(TensorDirectory.of_model(directory)),
    }


def _weights(directory: Path, manifest: Manifest) -> TensorDirectory:
    """Return the tensors of a bundle, as far as its files are there."""
    if "packed" in manifest.dtypes:
        return open_weights(directory)
    files = [directory / n for n in manifest.files if n.endswith(".safetensors")]
    return TensorDirectory([file for file in sorted(files) if file.is_file()])


def _sizes(weights: TensorDirectory) -> dict[str, Any]:
    return {
        "num_tensors": len(weights.tensors),
        "num_parameters": sum(math.prod(info.shape) for info in weights.tensors.values()),
        "tensor_bytes": weights.nbytes,
    }


def verify(config: VerifyConfig) -> VerifyResult:
    """Check that a bundle or prepared data is whole and unaltered, and (with a model) whose it is.

    Raises:
        BundleError: It is not.
        DataError: Prepared data is not.
    """
    path = fetched(config.path)
    if (path / DATA_MANIFEST).is_file():
        return _verify_data(config, path)
    manifest = read_manifest(path)
    opened = _OPENERS[manifest.kind](path)
    if config.model is not None:
        full = open_full_model(config.model, blocks_path(manifest))
        check_fits(path, manifest, full)
        if isinstance(opened, AdapterBundle):
            method, host = finetuning_method(opened.method), host_of_full_model(full, opened.plan)
            check_plug_in(method, path, opened.weights, host)
    return VerifyResult(
        verdict=_verdict("it belongs to", config.model),
        path=shown(config.path),
        kind=manifest.kind,
        id=manifest.id,
        num_files=len(manifest.files),
        num_tensors=len(opened.weights.tensors),
        checked_against=None if config.model is None else shown(config.model),
    )


def _verify_data(config: VerifyConfig, path: Path) -> VerifyResult:
    manifest = read_data_manifest(path)
    if config.model is None:
        check_files(path, manifest)
    else:
        model = model_at(config.model)
        open_prepared(path, model, load_config(model).vocab_size)
    return VerifyResult(
        verdict=_verdict("it was prepared for", config.model),
        path=shown(config.path),
        kind=_PREPARED,
        id=manifest.digest,
        num_files=len(manifest.files),
        num_tensors=0,
        checked_against=None if config.model is None else shown(config.model),
    )


def _verdict(relation: str, model: str | None) -> str:
    if model is None:
        return f"whole and unaltered; give --model to check which model {relation}"
    return f"whole and unaltered, and {relation} {shown(model)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _PluggedIn:
    weights: TensorDirectory


def _open_plugged_in(path: Path) -> _PluggedIn:
    manifest = read_verified(path, "plugged_in_model")
    beside = [path / name for name in manifest.files if name == BOTTLENECK_FILE]
    files = [*TensorDirectory.of_model(path).files, *beside]
    return _PluggedIn(weights=TensorDirectory(files))


_OPENERS: dict[Kind, Callable[[Path], EmulatorBundle | AdapterBundle | _PluggedIn]] = {
    "emulator_bundle": open_bundle,
    "adapter_bundle": open_adapter,
    "plugged_in_model": _open_plugged_in,
}
"""Kind of bundle to what opens and checks one."""
