# SPDX-License-Identifier: Apache-2.0
"""Whether a model's blocks can be taken apart as a split plan says, and still be what they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offsite_ray.architectures.detection import empty_model, get_blocks
from offsite_ray.architectures.surgery import kept_config
from offsite_ray.errors import FamilyError

if TYPE_CHECKING:
    from torch import nn
    from transformers.configuration_utils import PretrainedConfig

    from offsite_ray.architectures.detection import Architecture
    from offsite_ray.split import SplitPlan


def check_separable(config: PretrainedConfig, arch: Architecture, plan: SplitPlan) -> None:
    """Refuse a plan that this model cannot follow although it has the blocks.

    Raises:
        FamilyError: A block computes with its own index, or the cut separates a block that
            produces keys and values from one that uses them again.
    """
    if plan.keeps_every_block:
        return
    for name, value in (arch.family.position_dependent or {}).items():
        if getattr(config, name, None) == value:
            raise FamilyError(
                f"{config.model_type} with {name}={value} scales a block by its own index, so no "
                "block can take another's place; only a plan that keeps every block works"
            )
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    for consumer, producer in shared_kv(config, shared):
        if _role(plan, consumer) != _role(plan, producer):
            raise FamilyError(
                f"block {consumer} of this {config.model_type} uses the keys and values of block "
                f"{producer}, and the plan separates them ({_role(plan, producer)} and "
                f"{_role(plan, consumer)}); keep both on the same side"
            )
    if arch.recognised != "table":
        _check_alike(config, arch, plan)


def shared_kv(config: PretrainedConfig, num_shared: int) -> list[tuple[int, int]]:
    """Return ``(consumer, producer)`` of the last ``num_shared`` blocks.

    The producer is the last block before them of the consumer's attention type, as in
    transformers' ``Gemma3nTextAttention``.
    """
    total = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["attention"] * total
    first = total - num_shared
    pairs = []
    for consumer in range(first, total):
        producers = [i for i in range(first) if types[i] == types[consumer]]
        if producers:
            pairs.append((consumer, producers[-1]))
    return pairs


def _role(plan: SplitPlan, index: int) -> str:
    if index in plan.adapter:
        return "adapter block"
    return "emulator block" if index in plan.emulator else "dropped block"


def _check_alike(config: PretrainedConfig, arch: Architecture, plan: SplitPlan) -> None:
    """Compare what transformers builds for the full model and for the kept blocks.

    A family outside the table may derive a block from its place in ways that no rule knows: which
    blocks have experts, a window, a scale. So each kept block must be, where it comes to stand,
    the module that it was, and nothing outside the blocks may change with their number.
    """
    full = empty_model(config, arch.family.auto_class)
    small = empty_model(kept_config(config, arch, plan.kept), arch.family.auto_class)
    _refuse_change(config, "what is outside its blocks", _shapes(full, arch), _shapes(small, arch))
    before, after = (list(map(_traits, get_blocks(model, arch))) for model in (full, small))
    # An attribute that is the block's own index wherever it occurs (layer_idx) is to change.
    is_index = {
        (_attribute(name), type(value) is int and value == index)
        for index, traits in enumerate(before)
        for name, value in traits.items()
    }
    own_index = {name for name, is_own in is_index if is_own and (name, False) not in is_index}
    for position, index in enumerate(plan.kept):
        old, new = (
            {name: value for name, value in traits.items() if _attribute(name) not in own_index}
            for traits in (before[index], after[position])
        )
        _refuse_change(config, f"its block {index}", old, new)


def _attribute(name: str) -> str:
    """Return the last part of a dotted name."""
    return name.rpartition(".")[2]


def _shapes(model: nn.Module, arch: Architecture) -> dict[str, Any]:
    """Return the shapes of the tensors outside the blocks."""
    return {n: list(t.shape) for n, t in model.state_dict().items() if arch.block_of(n) is None}


def _traits(block: nn.Module) -> dict[str, Any]:
    """Return what a block is made of: classes, shapes, and plain values that its modules hold."""
    found: dict[str, Any] = {name: list(t.shape) for name, t in block.state_dict().items()}
    for path, module in block.named_modules():
        found[path] = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, int | float | str | None) and not name.startswith("_"):
                found[f"{path}.{name}".removeprefix(".")] = value
    return found


def _refuse_change(
    config: PretrainedConfig, what: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    odd = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    if odd:
        name = odd[0]
        raise FamilyError(
            f"{config.model_type} is in no table of families, and once blocks are dropped {what} "
            f"would differ: {name!r} would be {after.get(name)!r}, not {before.get(name)!r}; keep "
            "every block, or add a row to offsite_ray/architectures/families.py"
        )
