# SPDX-License-Identifier: Apache-2.0
"""LoRA (Hu et al., arXiv 2106.09685) by PEFT: on every linear layer of the adapter blocks.

Saved as a standard PEFT directory whose ``target_modules`` are the full model's module names, so
stock PEFT loads it onto the full model. Experts that transformers fuses into one tensor are no
linear layers and stay frozen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from offsite_ray.architectures import (
    Architecture,
    block_parameters,
    disk_state,
    empty_model,
    get_blocks,
    stored_alone,
)
from offsite_ray.bundle import TensorDirectory, all_finite, digest_file, specs, write_file
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

_USED = frozenset({"peft_type", "r", "lora_alpha", "target_modules"})
"""Settings of PEFT that the merge follows."""

_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    }
)
"""Settings that change nothing once the modules are named and the matrices trained."""

_OFF: tuple[object, ...] = (None, False, {}, [], "none")
"""Values of any other setting: what it would do is unknown to the merge."""

_KEEPS_BASE = (None, True, False, "gaussian", "orthogonal", "eva")
"""Ways to initialise LoRA after which the frozen weights are still the full model's."""


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
    """Return whether a module keeps its weight as ``(in, out)``, as GPT-2 does."""
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
    model = empty_model(host.config, host.arch.family.auto_class)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "fan_in_fan_out": _is_conv1d(model, host.own_name(modules[0])),
        "bias": "none",
    }
    (directory / PEFT_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return {
        PEFT_WEIGHTS: write_file(directory / PEFT_WEIGHTS, specs(tensors)),
        PEFT_CONFIG: digest_file(directory / PEFT_CONFIG),
    }


def lora_replacements(
    path: Path, saved: TensorDirectory, host: Host
) -> dict[str, Callable[[], Tensor]]:
    """Return the host's tensors with LoRA merged: ``W + (alpha / r) B A`` in float32, rounded.

    All are merged once, to see that they can be and which of them change; none is kept, and each
    is merged again when it is called for.

    Raises:
        PlugInError: The PEFT directory does not fit the host's adapter blocks exactly.
    """
    lora = read_lora(path, saved)
    merger = _Merger(
        path=path,
        host=host,
        pairs=lora.pairs,
        scale=lora.scale,
        model=empty_model(host.config, host.arch.family.auto_class),
        alone=stored_alone(host.config, host.arch, host.weights.tensors),
    )
    found: dict[str, Callable[[], Tensor]] = {}
    for modules in merger.groups():
        for name, tensor in merger.merged(modules).items():
            if not torch.equal(tensor, host.weights.view(name)):
                found[name] = lambda modules=modules, name=name: merger.merged(modules)[name]  # type: ignore[misc]
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraMatrices:
    """The matrices of a saved LoRA, which adds ``scale * B A`` to a weight."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """Module, as the full model calls it, to ``A`` of shape (r, in) and ``B`` of (out, r)."""
    scale: float


def read_lora(path: Path, saved: TensorDirectory) -> LoraMatrices:
    """Return the matrices of a PEFT directory, not merged.

    Raises:
        PlugInError: It holds something else than LoRA that can be plugged in.
    """
    settings = _settings(path)
    pairs = _pairs(path, saved, settings)
    return LoraMatrices(pairs=pairs, scale=settings["lora_alpha"] / settings["r"])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Merger:
    """What merging takes; it holds no tensor of the host."""

    path: Path
    host: Host
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """Module, as the full model calls it, to ``A`` and ``B``."""
    scale: float
    model: PreTrainedModel
    """The host's, on the meta device."""
    alone: Mapping[str, str]
    """Name in memory to name on disk, of parameters that are stored as they are."""

    def groups(self) -> list[list[str]]:
        """Return the modules in groups to merge: one by one, or by block where it is fused."""
        known = {name for name, _ in self.model.named_parameters()}
        groups: dict[str, list[str]] = {}
        for module in self.pairs:
            index, weight = self.host.arch.block_of(module), self._weight(module)
            if index not in self.host.positions or weight not in known:
                raise PlugInError(f"{self.path} targets {module!r}, which is in no adapter block")
            group = weight if weight in self.alone else f"block {index}"
            groups.setdefault(group, []).append(module)
        return list(groups.values())

    def merged(self, modules: Sequence[str]) -> dict[str, Tensor]:
        """Return tensors of the host, by name on disk, with the LoRA of some modules in them."""
        host, names = self.host, [self._weight(module) for module in modules]
        alone = all(name in self.alone for name in names)
        if alone:
            parameters = {name: host.weights.view(self.alone[name]) for name in names}
        else:
            place = host.arch.block_of(names[0])
            disk = [name for name in host.block_names if host.arch.block_of(name) == place]
            parameters = block_parameters(
                host.config, host.arch, {name: host.weights.read(name) for name in disk}
            )
        for module, name in zip(modules, names, strict=True):
            parameters[name] = self._merge(module, parameters[name])
        stored = (
            {self.alone[name]: tensor for name, tensor in parameters.items()}
            if alone
            else disk_state(host.config, host.arch, parameters, host.weights.tensors)
        )
        return {
            name: rounded(name, tensor, host.weights.tensors[name].dtype)()
            for name, tensor in stored.items()
        }

    def _weight(self, module: str) -> str:
        return f"{self.host.own_name(module)}.weight"

    def _merge(self, module: str, weight: Tensor) -> Tensor:
        a, b = self.pairs[module]
        # As PEFT does: how a layer keeps its weight is the layer's to say, not the file's.
        turned = _is_conv1d(self.model, self.host.own_name(module))
        shape = [b.shape[0], a.shape[1]][:: -1 if turned else 1]
        if shape != list(weight.shape):
            raise PlugInError(
                f"{self.path}: LoRA of {module!r} makes {shape} where the model has "
                f"{list(weight.shape)}"
            )
        delta = (b @ a).mul_(self.scale)
        return (delta.T if turned else delta).add_(weight.float()).to(weight.dtype)


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads((path / PEFT_CONFIG).read_text(encoding="utf-8"))
        if settings["peft_type"] != "LORA":
            raise ValueError(f"peft_type {settings['peft_type']!r} is not LORA")
        for key, value in settings.items():
            allowed = _KEEPS_BASE if key == "init_lora_weights" else _OFF
            if key not in _USED | _WITHOUT_EFFECT and value not in allowed:
                raise ValueError(f"{key!r} of {value!r} cannot be plugged in")
        if not settings["r"] > 0 or not abs(settings["lora_alpha"]) < float("inf"):
            raise ValueError("r and lora_alpha must be finite, r positive")
        return {**settings, "target_modules": set(settings["target_modules"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
        names = [f"{_PREFIX}{module}.lora_{x}.weight" for x in "AB"]
        down, up = (saved.tensors[name].shape for name in names)
        if len(down) != 2 or len(up) != 2 or {down[0], up[1]} != {settings["r"]}:
            raise PlugInError(
                f"{path}: LoRA of {module!r} has the shapes {list(down)} and {list(up)}, "
                f"not of rank {settings['r']}"
            )
        if other := {saved.tensors[name].dtype for name in names} - {"F32"}:
            raise PlugInError(f"{path}: LoRA of {module!r} is {min(other)}, not F32")
        a, b = map(saved.read, names)
        if not (all_finite(a) and all_finite(b)):
            raise PlugInError(f"{path}: LoRA of {module!r} holds values that are not finite")
        pairs[module] = (a, b)
    return pairs
