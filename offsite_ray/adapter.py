# SPDX-License-Identifier: Apache-2.0
"""Adapter bundles: what goes back from the data owner to the model owner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offsite_ray.bundle import (
    Manifest,
    TensorDirectory,
    read_verified,
    write_manifest,
)
from offsite_ray.errors import IntegrityError
from offsite_ray.storage import fetched, published

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from offsite_ray.emulator import EmulatorBundle
    from offsite_ray.split import SplitPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterBundle:
    """An adapter bundle that was opened and verified."""

    path: Path
    manifest: Manifest
    method: str
    """Fine-tuning method by which it was trained."""
    weights: TensorDirectory

    @property
    def plan(self) -> SplitPlan:
        """The split plan, in absolute indices of the full model."""
        return self.manifest.plan


def open_adapter(directory: str | Path) -> AdapterBundle:
    """Return the adapter bundle of a directory or a URI, every file of it verified.

    Raises:
        BundleError: It is no adapter bundle.
        IntegrityError: It is not whole, was altered, or contradicts itself.
    """
    path = fetched(directory)
    manifest = read_verified(path, "adapter_bundle")
    finetuning = manifest.recipe.get("finetuning")
    method = finetuning.get("method") if isinstance(finetuning, dict) else None
    if not isinstance(method, str):
        raise IntegrityError(f"{path}: the manifest does not say by which method it was trained")
    files = sorted(path / name for name in manifest.files if name.endswith(".safetensors"))
    return AdapterBundle(
        path=path, manifest=manifest, method=method, weights=TensorDirectory(files)
    )


def write_adapter(
    bundle: EmulatorBundle,
    out: str | Path,
    save: Callable[[Path], Mapping[str, str]],
    recipe: Mapping[str, Any],
    measured: Mapping[str, Any],
) -> Manifest:
    """Write an adapter bundle.

    Args:
        bundle: The emulator bundle that it was trained against.
        out: Directory or URI to write.
        save: Writes the trained tensors into a directory; returns file name to digest.
        recipe: How it was trained; ``recipe["method"]`` names the fine-tuning method.
        measured: Figures of the run.
    """
    with published(out) as tmp:
        files = save(tmp)
        manifest = Manifest(
            kind="adapter_bundle",
            model=bundle.manifest.model,
            plan=bundle.plan,
            full_model=bundle.manifest.full_model,
            files=dict(files),
            recipe={**bundle.manifest.recipe, "finetuning": dict(recipe)},
            dtypes={**bundle.manifest.dtypes, "compute": recipe.get("dtype")},
            trained_against=bundle.manifest.id,
            measured=dict(measured),
        )
        return write_manifest(tmp, manifest)
