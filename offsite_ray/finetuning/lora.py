# SPDX-License-Identifier: Apache-2.0
"""LoRA (Hu et al., arXiv 2106.09685) by PEFT: on every linear layer of the adapter blocks.

Saved as a standard PEFT directory whose ``target_modules`` are the full model's module names, so
stock PEFT loads it onto the full model. Experts that transformers fuses into one tensor are no
linear layers and stay frozen.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from offsite_ray.architectures import (
    Architecture,
    block_parameters,
    disk_state,
    get_blocks,
)
from offsite_ray.bundle import TensorDirectory, digest_file, specs, write_file
from offsite_ray.emulator import rounded
from offsite_ray.errors import ConfigError, PlugInError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from offsite_ray.config import FinetuneConfig
    from offsite_ray.finetuning.host import Host

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

_PREFIX = "base_model.model."
"""With which PEFT begins every name."""

_REFUSED = {
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "lora_bias": False,
    "target_parameters": None,
}
"""Settings of PEFT that would change the merge, and the only value of each that is accepted."""


def linear_modules(model: PreTrainedModel, arch: Architecture, indices: Sequence[int]) -> list[str]:
    """Return the names of the linear layers in some blocks."""
    from transformers.pytorch_utils import Conv1D

    blocks = get_blocks(model, arch)
    return [
        f"{arch.family.blocks}.{index}.{name}"
        for index in indices
        for name, module in blocks[index].named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]


def prepare_lora(
    model: PreTrainedModel, arch: Architecture, indices: Sequence[int], config: FinetuneConfig
) -> None:
    """Inject LoRA into every linear layer of the blocks; only its matrices train."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = linear_modules(model, arch, indices)
    if not targets:
        raise ConfigError(
            f"the blocks of this {model.config.model_type} have no linear layer; use --method full"
        )
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT divides: any number
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=_is_conv1d(model, targets[0]),
    )
    inject_adapter_in_model(lora, model)


def _is_conv1d(model: PreTrainedModel, name: str) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(model.get_submodule(name), Conv1D)


def save_lora(
    directory: Path, state: Mapping[str, Tensor], host: Host, config: FinetuneConfig
) -> dict[str, str]:
    """Write a standard PEFT directory in float32."""
    tensors = {
        _PREFIX + host.full_name(name.replace(".default.", ".")): tensor.float()
        for name, tensor in state.items()
    }
    modules = sorted({name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in tensors})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "fan_in_fan_out": _transposed(host, tensors, modules[0]),
        "bias": "none",
    }
    (directory / PEFT_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return {
        PEFT_WEIGHTS: write_file(directory / PEFT_WEIGHTS, specs(tensors)),
        PEFT_CONFIG: digest_file(directory / PEFT_CONFIG),
    }


def _transposed(host: Host, tensors: Mapping[str, Tensor], module: str) -> bool:
    """Return whether the module keeps its weight as ``(in, out)``, as GPT-2 does."""
    from offsite_ray.architectures import empty_model

    return _is_conv1d(empty_model(host.config), host.own_name(module))


def lora_replacements(
    path: Path, saved: TensorDirectory, host: Host
) -> dict[str, Callable[[], Tensor]]:
    """Return the host's tensors with LoRA merged: ``W + (alpha / r) B A`` in float32, rounded.

    Raises:
        PlugInError: The PEFT directory does not fit the host's adapter blocks exactly.
    """
    settings = _settings(path)
    pairs = _pairs(path, saved, settings)
    scale = settings["lora_alpha"] / settings["r"]
    disk = {
        name: host.weights.read(name)
        for name in host.weights.tensors
        if host.arch.block_of(name) in host.positions.values()
    }
    parameters = block_parameters(host.config, host.arch, disk)
    for module, (a, b) in pairs.items():
        name = f"{host.own_name(module)}.weight"
        if host.arch.block_of(module) not in host.positions or name not in parameters:
            raise PlugInError(f"{path} targets {module!r}, which is in no adapter block")
        delta = scale * (b.float() @ a.float())
        delta = delta.T if settings["fan_in_fan_out"] else delta
        if delta.shape != parameters[name].shape:
            raise PlugInError(
                f"{path}: LoRA of {module!r} makes {list(delta.shape)} where the model has "
                f"{list(parameters[name].shape)}"
            )
        parameters[name] = (parameters[name].float() + delta).to(parameters[name].dtype)
    merged = disk_state(host.config, host.arch, parameters, host.weights.tensors)
    return {
        name: rounded(name, tensor, host.weights.tensors[name].dtype)
        for name, tensor in merged.items()
        if not torch.equal(tensor, disk[name])
    }


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads((path / PEFT_CONFIG).read_text(encoding="utf-8"))
        if settings["peft_type"] != "LORA":
            raise ValueError(f"peft_type {settings['peft_type']!r} is not LORA")
        for key, allowed in _REFUSED.items():
            if settings.get(key, allowed) not in (allowed, None):
                raise ValueError(f"{key}={settings[key]!r}, only {allowed!r} can be plugged in")
        if not settings["r"] > 0 or not abs(settings["lora_alpha"]) < float("inf"):
            raise ValueError("r and lora_alpha must be finite, r positive")
        return {
            **settings,
            "fan_in_fan_out": bool(settings.get("fan_in_fan_out")),
            "target_modules": set(settings["target_modules"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlugInError(f"{path / PEFT_CONFIG} cannot be used: {error}") from error


def _pairs(
    path: Path, saved: TensorDirectory, settings: Mapping[str, Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return module name to ``A`` of shape (r, in) and ``B`` of shape (out, r)."""
    modules = settings["target_modules"]
    expected = {f"{_PREFIX}{m}.lora_{x}.weight" for m in modules for x in "AB"}
    if odd := sorted(expected ^ set(saved.tensors)):
        state = "lacks" if odd[0] in expected else "holds"
        raise PlugInError(f"{path} {state} tensor {odd[0]!r}, unlike its {PEFT_CONFIG}")
    pairs = {}
    for module in sorted(modules):
        a, b = (saved.read(f"{_PREFIX}{module}.lora_{x}.weight") for x in "AB")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != settings["r"] or b.shape[1] != settings["r"]:
            raise PlugInError(
                f"{path}: LoRA of {module!r} has the shapes {list(a.shape)} and {list(b.shape)}, "
                f"not of rank {settings['r']}"
            )
        if a.dtype != torch.float32 or b.dtype != torch.float32:
            raise PlugInError(f"{path}: LoRA of {module!r} is {a.dtype}, not float32")
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise PlugInError(f"{path}: LoRA of {module!r} holds values that are not finite")
        pairs[module] = (a, b)
    return pairs
