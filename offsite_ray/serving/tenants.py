# SPDX-License-Identifier: Apache-2.0
"""What a verified adapter bundle has of its own, for the router; a row a fine-tuning method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offsite_ray.adapter import AdapterBundle, open_adapter
from offsite_ray.architectures import block_parameters, empty_model
from offsite_ray.architectures.bottleneck import BOTTLENECK_NAME
from offsite_ray.emulator import check_fits
from offsite_ray.errors import ConfigError, unknown_name
from offsite_ray.finetuning.host import Host, host_of_full_model
from offsite_ray.finetuning.lora import read_lora
from offsite_ray.finetuning.methods import bottleneck_tensors, finetuning_method
from offsite_ray.finetuning.writing import checked_replacements
from offsite_ray.serving.own import Net, Own, Pair
from offsite_ray.serving.routing import check_row_wise

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from offsite_ray.emulator import FullModel


def read_own(directory: str | Path, full: FullModel) -> Own:
    """Return what an adapter bundle has of its own, everything verified.

    Args:
        directory: The adapter bundle.
        full: The model that it is served with.

    Raises:
        BundleError: It is no adapter bundle, was altered, or does not fit the model.
    """
    return own_of(open_adapter(directory), full)


def own_of(adapter: AdapterBundle, full: FullModel) -> Own:
    """Return what a verified adapter bundle has of its own; see :func:`read_own`.

    Raises:
        FamilyError: Rows of several tenants cannot be computed in one of its modules.
    """
    check_fits(adapter.path, adapter.manifest, full, full.weights.files, from_memory=True)
    host = host_of_full_model(full, adapter.plan)
    if adapter.method not in _READERS:
        raise ConfigError(unknown_name("fine-tuning method", adapter.method, _READERS))
    own = _READERS[adapter.method](adapter, host)
    model = empty_model(full.config)
    for name in own.modules - set(own.nets):
        check_row_wise(name, model.get_submodule(name))
    return own


def _parameters(adapter: AdapterBundle, host: Host) -> dict[str, dict[str, Tensor]]:
    """Return the parameters that differ from the full model's, by name of their module."""
    method = finetuning_method(adapter.method)
    replaced = checked_replacements(method, adapter.path, adapter.weights, host)
    new = {name: replaced[name]() for name in replaced}
    disk = {name: new.get(name, host.weights.view(name)) for name in host.block_names}
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in block_parameters(host.config, host.arch, disk).items():
        module, _, parameter = name.rpartition(".")
        found.setdefault(module, {})[parameter] = tensor
    return found


def _full(adapter: AdapterBundle, host: Host) -> Own:
    found = _parameters(adapter, host)
    # Cloned: what is mapped holds the file, which may be a copy that is about to go.
    return Own(weights={name: {p: t.clone() for p, t in m.items()} for name, m in found.items()})


def _bitfit(adapter: AdapterBundle, host: Host) -> Own:
    every = _parameters(adapter, host)
    return Own(biases={name: p["bias"].clone() for name, p in every.items() if "bias" in p})


def _lora(adapter: AdapterBundle, host: Host) -> Own:
    checked_replacements(finetuning_method("lora"), adapter.path, adapter.weights, host)
    lora = read_lora(adapter.path, adapter.weights)
    pairs = lora.pairs.items()
    return Own(pairs={name: Pair(down=a, up=b * lora.scale) for name, (a, b) in pairs})


def _bottleneck(adapter: AdapterBundle, host: Host) -> Own:
    tensors = bottleneck_tensors(adapter.path, adapter.weights, host)
    nets = {}
    for name in tensors:
        if name.endswith(".down.weight"):
            net = name.removesuffix(".down.weight")
            nets[net.removesuffix(f".{BOTTLENECK_NAME}")] = Net(
                down=tensors[f"{net}.down.weight"],
                down_bias=tensors[f"{net}.down.bias"],
                up=tensors[f"{net}.up.weight"],
                up_bias=tensors[f"{net}.up.bias"],
            )
    return Own(nets=nets)


_READERS: dict[str, Callable[[AdapterBundle, Host], Own]] = {
    "full": _full,
    "bitfit": _bitfit,
    "lora": _lora,
    "bottleneck": _bottleneck,
}
