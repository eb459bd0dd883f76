# SPDX-License-Identifier: Apache-2.0
"""Plug-in: put an adapter bundle into the full model, on disk or in memory.

What comes from the data owner is checked against the full model before anything is written: the
fingerprint, the plan, and the name, shape, dtype and finiteness of every tensor. Trained tensors
have the full model's stored dtype already; LoRA is merged in float32 and rounded to it.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offsite_ray.adapter import AdapterBundle, open_adapter
from offsite_ray.architectures import Notice, block_parameters
from offsite_ray.architectures.bottleneck import detach_bottlenecks, set_bottlenecks
from offsite_ray.bundle import Manifest, write_manifest
from offsite_ray.emulator import blocks_path, check_fits, open_full_model
from offsite_ray.finetuning.host import Host, host_of_full_model
from offsite_ray.finetuning.methods import bottleneck_tensors, finetuning_method
from offsite_ray.finetuning.writing import checked_replacements, write_plugged_in
from offsite_ray.storage import check_untaken, published
from offsite_ray.uris import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

    from offsite_ray.bundle import TensorInfo
    from offsite_ray.config import PlugInConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PlugInResult:
    """What ``plug-in`` made."""

    out: str
    id: str
    adapter: str
    """Id of the adapter bundle."""
    method: str
    replaced: tuple[str, ...]
    """Names of the replaced tensors; empty for adapters that stay beside the weights."""
    added: tuple[str, ...]
    """Names of the tensors of adapters that stay beside the weights."""
    seconds: float


def plug_in(config: PlugInConfig, notice: Notice | None = None) -> PlugInResult:
    """Write the full model with an adapter bundle plugged in.

    Args:
        config: Which adapter into which model.
        notice: With ``config.verbose``, told of each tensor that is replaced or added.

    Raises:
        PlugInError: The adapter does not fit the full model; nothing is written.
        BundleError: It is no adapter bundle, or one that was altered.
    """
    start = time.perf_counter()
    check_untaken(config.out)
    adapter = open_adapter(config.adapter)
    full = open_full_model(config.model, blocks_path(adapter.manifest))
    host = host_of_full_model(full, adapter.plan)
    method = finetuning_method(adapter.method)
    linked = host.other_files if method.replacements else full.weights.files
    known = check_fits(adapter.path, adapter.manifest, full, linked, from_memory=True)
    with published(config.out) as tmp:
        done = write_plugged_in(tmp, host, method, adapter.path, adapter.weights, known)
        manifest = Manifest(
            kind="plugged_in_model",
            model=adapter.manifest.model,
            plan=adapter.plan,
            full_model=adapter.manifest.full_model,
            files=done.files,
            recipe={**adapter.manifest.recipe, "plug_in": {"adapter": adapter.manifest.id}},
            dtypes=adapter.manifest.dtypes,
            trained_against=adapter.manifest.trained_against,
            measured={"seconds": time.perf_counter() - start},
        )
        manifest = write_manifest(tmp, manifest)
    if config.verbose and notice is not None:
        for name in done.replaced:
            notice(f"replaced {_told(full.weights.tensors[name])}")
        for name in done.added:
            notice(f"added {_told(adapter.weights.tensors[name])} beside the weights")
    return PlugInResult(
        out=shown(config.out),
        id=manifest.id,
        adapter=adapter.manifest.id,
        method=method.name,
        replaced=done.replaced,
        added=done.added,
        seconds=time.perf_counter() - start,
    )


def _told(info: TensorInfo) -> str:
    return f"{info.name} ({info.dtype} {list(info.shape)})"


@contextlib.contextmanager
def applied(model: PreTrainedModel, host: Host, adapter: AdapterBundle) -> Iterator[None]:
    """Put an adapter into a model in memory, and take it out again at the end.

    Args:
        model: The model of ``host``, loaded in any dtype; the adapter's stored values are cast.
        host: The full model or the emulator model on disk.
        adapter: Already checked against the full model, or trained against the emulator's bundle.
    """
    method = finetuning_method(adapter.method)
    if method.replacements is None:
        tensors = bottleneck_tensors(adapter.path, adapter.weights, host)
        indices, handles = set_bottlenecks(model, host.arch, tensors)
        try:
            yield
        finally:
            detach_bottlenecks(model, host.arch, indices, handles)
        return
    new = _block_parameters(host, adapter)
    parameters = {n: p for n, p in model.named_parameters() if n in new}
    old = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = new.pop(name).to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = old[name]


def _block_parameters(host: Host, adapter: AdapterBundle) -> dict[str, Tensor]:
    """Return the parameters of the adapter blocks by name in memory, with an adapter in them."""
    method = finetuning_method(adapter.method)
    replaced = checked_replacements(method, adapter.path, adapter.weights, host)
    disk = {
        name: replaced[name]() if name in replaced else host.weights.view(name)
        for name in host.block_names
    }
    return block_parameters(host.config, host.arch, disk)
