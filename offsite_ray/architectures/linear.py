# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint are the matrices of the blocks' linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from offsite_ray.architectures.detection import empty_model
from offsite_ray.architectures.surgery import stored_alone

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers.configuration_utils import PretrainedConfig

    from offsite_ray.architectures.detection import Architecture


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers in a module by path: ``nn.Linear``, and GPT-2's ``Conv1D``."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D)
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, kinds)}


def feed_forward(block: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """Return the paths of a block's feed-forward: into its inner width (one, or up and gate), out.

    It is the last of the groups of linear layers that have one parent, behind attention's; None
    where what goes into its inner width is fused, or there is no such group, as with experts.
    """
    layers = linear_layers(block)
    parents = [path.rpartition(".")[0] for path in layers]
    if len(set(parents)) < 2:
        return None
    *ups, down = (path for path in layers if path.rpartition(".")[0] == parents[-1])
    inner = widths(layers[down])[0]
    if not ups or any(widths(layers[up])[1] != inner for up in ups):
        return None
    return tuple(ups), down


def widths(layer: Any) -> tuple[int, int]:
    """Return the numbers of inputs and of outputs of a linear layer."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


def linear_weights(
    config: PretrainedConfig, arch: Architecture, disk_names: Iterable[str]
) -> dict[str, bool]:
    """Return the names on disk of the blocks' linear weights, and which are ``(in, out)``.

    The others are ``(out, in)``. Embeddings, norms and biases are none of them, nor is what a
    model fuses while it loads from several tensors (experts of some families) unless those are
    matrices on disk.

    Args:
        config: Of the model.
        arch: Its architecture.
        disk_names: Every name in its checkpoint.
    """
    from transformers.core_model_loading import revert_weight_conversion

    names = list(disk_names)
    model = empty_model(config, arch.family.auto_class)
    alone = stored_alone(config, arch, names)
    found = {
        alone[f"{path}.weight"]: not isinstance(layer, nn.Linear)
        for path, layer in linear_layers(model).items()
        if f"{path}.weight" in alone
    }
    fused = {
        name: parameter
        for name, parameter in model.named_parameters()
        if arch.block_of(name) is not None and name not in alone
    }
    by_bare_name = {arch.bare(name): name for name in names}
    for name, tensor in revert_weight_conversion(model, fused).items():
        if tensor.ndim == 2 and name.endswith(".weight") and arch.bare(name) in by_bare_name:
            found[by_bare_name[arch.bare(name)]] = False
    return found
