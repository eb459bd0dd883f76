# SPDX-License-Identifier: Apache-2.0
"""The config of a model that keeps some blocks, and names in memory against names on disk."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.architectures.detection import empty_model, get_blocks, model_class
from offsite_ray.architectures.families import BLOCK_LISTS, used
from offsite_ray.errors import FamilyError, IntegrityError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.configuration_utils import PretrainedConfig

    from offsite_ray.architectures.detection import Architecture


def kept_config(config: PretrainedConfig, arch: Architecture, kept: Sequence[int]) -> Any:
    """Return the config of the model that has the blocks ``kept`` of the one of ``config``.

    Args:
        config: Of a model with all its blocks; not changed.
        arch: Its architecture.
        kept: Absolute indices in ascending order.

    Raises:
        FamilyError: transformers refuses the config of the smaller model.
    """
    values = config.to_dict()
    for rule in arch.family.config_rules:
        values.update(rule(values, kept))
    if shared := getattr(config, "num_kv_shared_layers", None):
        first = arch.num_blocks - shared
        values["num_kv_shared_layers"] = sum(index >= first for index in kept)
    key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values[key] = len(kept)
    try:
        return type(config).from_dict(values)
    except Exception as error:
        raise FamilyError(
            f"transformers refuses a {config.model_type} of {len(kept)} of its blocks: "
            f"{first_line(error)}"
        ) from error


def block_kinds(config: PretrainedConfig) -> list[tuple[Any, ...]]:
    """Return the kind of every block, by which the config's per-block lists tell them apart."""
    values = config.to_dict()
    lists = [values[name] for name in BLOCK_LISTS if isinstance(values.get(name), list | tuple)]
    count = config.num_hidden_layers
    return [tuple(per_block[index] for per_block in lists) for index in range(count)]


def one_of_each_kind(config: PretrainedConfig) -> list[int]:
    """Return the first block of each kind."""
    kinds = block_kinds(config)
    return [kinds.index(kind) for kind in dict.fromkeys(kinds)]


def disk_state(
    config: PretrainedConfig,
    arch: Architecture,
    tensors: Mapping[str, Tensor],
    disk_names: Iterable[str],
) -> dict[str, Tensor]:
    """Return tensors of a model in memory under the names (and shapes) of its checkpoint.

    transformers fuses experts and renames modules while it loads; its own reverse conversion, which
    ``save_pretrained`` uses, undoes that. A tied tensor comes under each name that the checkpoint
    has for it: of copies that differ, transformers would make two.

    Args:
        config: Config of the model that the tensors are of.
        arch: Its architecture.
        tensors: In-memory parameter name to tensor; whole blocks, so that a conversion finds all
            its parts.
        disk_names: Names in the checkpoint's directory, with or without the base model's prefix.

    Raises:
        IntegrityError: A tensor has no counterpart in the checkpoint.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = empty_model(config, arch.family.auto_class)
    by_bare_name = {arch.bare(name): name for name in disk_names}
    found = {}
    for name, tensor in revert_weight_conversion(model, dict(tensors)).items():
        if arch.bare(name) not in by_bare_name:
            raise IntegrityError(
                f"the model computes with {name!r}, which its checkpoint does not hold; save the "
                "checkpoint anew with this version of transformers"
            )
        found[by_bare_name[arch.bare(name)]] = tensor
    for twin, name in model.all_tied_weights_keys.items():
        own, other = (by_bare_name.get(arch.bare(n)) for n in (twin, name))
        if own is not None and other in found and twin not in tensors:
            found[own] = found[other]
    return found


def parameter_names(
    config: PretrainedConfig, arch: Architecture, disk_names: Iterable[str]
) -> set[str]:
    """Return the names on disk of the blocks' parameters.

    Checkpoints of some families hold more in their blocks, which nobody trains: causal masks
    (GPT-2's ``attn.bias``), rotary frequencies.
    """
    model = empty_model(config, arch.family.auto_class)
    inside = {name: p for name, p in model.named_parameters() if arch.block_of(name) is not None}
    return set(disk_state(config, arch, inside, disk_names))


def stored_alone(
    config: PretrainedConfig, arch: Architecture, disk_names: Iterable[str]
) -> dict[str, str]:
    """Return the names on disk, by name in memory, of the blocks' parameters that load as stored.

    The others are fused from several tensors, or taken apart.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = empty_model(config, arch.family.auto_class)
    by_bare_name = {arch.bare(name): name for name in disk_names}
    inside = {name: p for name, p in model.named_parameters() if arch.block_of(name) is not None}
    stored = {id(t): arch.bare(n) for n, t in revert_weight_conversion(model, inside).items()}
    return {
        name: by_bare_name[stored[id(parameter)]]
        for name, parameter in inside.items()
        if stored.get(id(parameter)) in by_bare_name
    }


def block_model(
    config: PretrainedConfig, arch: Architecture, indices: Sequence[int], disk: Mapping[str, Tensor]
) -> PreTrainedModel:
    """Return a model of only the blocks ``indices``, loaded from tensors under names on disk.

    Everything outside the blocks is freshly initialised and of no use. Block ``indices[j]`` of the
    full model is block ``j`` of the result.

    Raises:
        IntegrityError: A tensor of the blocks is missing, too many, or of the wrong shape.
    """
    from offsite_ray.architectures.loading import quiet_transformers

    position = {index: j for j, index in enumerate(indices)}
    state = {}
    for name, tensor in disk.items():
        index = arch.block_of(name)
        if index not in position:
            raise IntegrityError(f"tensor {name!r} is of none of the blocks {list(indices)}")
        state[arch.rename(name, position[index])] = tensor
    small = kept_config(config, arch, indices)
    cls = model_class(small, arch.family.auto_class)
    # The model has one dtype: the one that holds all that are stored.
    stored = {tensor.dtype for tensor in disk.values() if tensor.is_floating_point()}
    dtype = functools.reduce(torch.promote_types, stored) if stored else torch.float32
    with quiet_transformers():
        model, info = cls.from_pretrained(
            None,
            config=small,
            state_dict=state,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    missing = sorted(name for name in info["missing_keys"] if arch.block_of(name) is not None)
    wrong = [
        *missing,
        *used(config.model_type, info["unexpected_keys"]),
        *map(str, info["mismatched_keys"]),
    ]
    if wrong:
        raise IntegrityError(f"tensor {wrong[0]!r} is missing, unknown or of the wrong shape")
    return model  # type: ignore[no-any-return]


def block_parameters(
    config: PretrainedConfig, arch: Architecture, disk: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return tensors of whole blocks, given under names on disk, by in-memory parameter name."""
    indices = sorted({index for name in disk if (index := arch.block_of(name)) is not None})
    if not indices:
        return {}
    model = block_model(config, arch, indices, disk)
    found = {}
    for j, block in enumerate(get_blocks(model, arch)):
        for name, tensor in block.state_dict().items():
            found[f"{arch.family.blocks}.{indices[j]}.{name}"] = tensor
    return found
