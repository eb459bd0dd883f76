# SPDX-License-Identifier: Apache-2.0
"""Which family a model directory belongs to: by the table, by its structure, or by ``--blocks``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from offsite_ray.architectures.families import BLOCK_LISTS, FAMILIES, Family, gather_lists
from offsite_ray.errors import FamilyError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.configuration_utils import PretrainedConfig

Notice = Callable[[str], None]
"""Told in one line what the user should know although nothing is wrong."""

Recognised = Literal["table", "structure", "path"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family together with the numbers of one model."""

    family: Family
    num_blocks: int
    class_name: str
    """Class of the model in transformers, e.g. ``LlamaForCausalLM``."""
    base_prefix: str
    """Prefix that tensor names of a checkpoint may lack, e.g. ``model``."""
    recognised: Recognised

    @cached_property
    def _block_name(self) -> re.Pattern[str]:
        base, _, rest = self.family.blocks.partition(".")
        path = re.escape(self.family.blocks)
        if base == self.base_prefix and rest:
            path = rf"(?:{re.escape(base)}\.)?{re.escape(rest)}"
        return re.compile(rf"({path}\.)(\d+)(\..+)")

    @property
    def blocks_path(self) -> str | None:
        """What ``--blocks`` must say to find the same blocks; None for a family in the table."""
        return None if self.recognised == "table" else self.family.blocks

    def block_of(self, name: str) -> int | None:
        """Return the index of the block that a tensor (or module) of that name belongs to."""
        match = self._block_name.fullmatch(name)
        return int(match[2]) if match else None

    def rename(self, name: str, index: int) -> str:
        """Return the name with the index of its block replaced; other names as they are."""
        return self._block_name.sub(rf"\g<1>{index}\g<3>", name)

    def bare(self, name: str) -> str:
        """Return the name without the base model's prefix, by which names compare."""
        return name.removeprefix(f"{self.base_prefix}.")


def model_class(config: PretrainedConfig, auto_class: str = "AutoModelForCausalLM") -> Any:
    """Return transformers' class for a config.

    Raises:
        FamilyError: transformers has none with the head that ``auto_class`` stands for.
    """
    import transformers

    mapping = getattr(transformers, auto_class)._model_mapping
    if type(config) not in mapping:
        raise FamilyError(
            f"transformers has no {auto_class} for model type {config.model_type!r}; "
            f"known families: {', '.join(FAMILIES)}"
        )
    return mapping[type(config)]


def empty_model(config: PretrainedConfig, auto_class: str = "AutoModelForCausalLM") -> Any:
    """Return the model on the ``meta`` device: names and shapes without memory."""
    with torch.device("meta"):
        return model_class(config, auto_class)._from_config(config)


def resolve_architecture(
    config: PretrainedConfig, blocks: str | None = None, notice: Notice | None = None
) -> Architecture:
    """Return the architecture of a model.

    Args:
        config: The full model's (or a bundle's).
        blocks: Path of the block list (``--blocks``), where the table has no row.
        notice: Told how a family outside the table was recognised.

    Raises:
        FamilyError: No row, and the structure is not one list of equal blocks.
    """
    family, recognised = _family(config, blocks)
    if recognised != "table" and notice is not None:
        notice(
            f"model type {config.model_type!r} is in no table; its blocks were recognised by "
            f"{recognised} as {family.blocks!r}, and are checked on a few tokens"
        )
    cls = model_class(config, family.auto_class)
    return Architecture(
        family=family,
        num_blocks=config.num_hidden_layers,
        class_name=cls.__name__,
        base_prefix=cls.base_model_prefix,
        recognised=recognised,
    )


def _family(config: PretrainedConfig, blocks: str | None) -> tuple[Family, Recognised]:
    if blocks is None and config.model_type in FAMILIES:
        return FAMILIES[config.model_type], "table"
    if config.get_text_config() is not config:
        raise FamilyError(
            f"model type {config.model_type!r} holds several models; give the language model's "
            f"own directory, of one of: {', '.join(FAMILIES)}"
        )
    found = block_lists(empty_model(config), config.num_hidden_layers)
    if blocks is not None and blocks not in found:
        raise FamilyError(
            f"--blocks {blocks!r} is no list of {config.num_hidden_layers} equal blocks in "
            f"{config.model_type!r}{did_you_mean(blocks, found)} (found: "
            f"{', '.join(found) or 'none'})"
        )
    if blocks is None and len(found) != 1:
        raise FamilyError(
            f"model type {config.model_type!r} is in no table (offsite_ray/architectures/"
            f"families.py: {', '.join(FAMILIES)}) and has not one list of "
            f"{config.num_hidden_layers} equal blocks but {len(found)} "
            f"({', '.join(found) or 'none'}); name one with --blocks PATH, or add a row"
        )
    family = Family(
        model_type=config.model_type,
        blocks=blocks or found[0],
        config_rules=(gather_lists(_own_block_lists(config)),),
    )
    return family, "structure" if blocks is None else "path"


def block_lists(model: nn.Module, num_blocks: int) -> list[str]:
    """Return the paths of the outermost lists of ``num_blocks`` modules of one class."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks and not inside:
            classes = {type(block) for block in module}
            if len(classes) == 1 and any(True for _ in module.parameters()):
                found.append(path)
    return found


def _own_block_lists(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the names of the config's lists that are as long as the stack."""
    own = [
        name
        for name, value in config.to_dict().items()
        if isinstance(value, list)
        and len(value) == config.num_hidden_layers
        and name != "architectures"
        and not name.endswith("_token_id")
    ]
    return tuple(dict.fromkeys((*BLOCK_LISTS, *own)))


def get_blocks(model: PreTrainedModel, arch: Architecture) -> nn.ModuleList:
    """Return the block list of a model in memory."""
    blocks = model.get_submodule(arch.family.blocks)
    if not isinstance(blocks, nn.ModuleList):
        raise FamilyError(f"{arch.family.blocks!r} is a {type(blocks).__name__}, not a block list")
    return blocks


def set_blocks(model: PreTrainedModel, arch: Architecture, blocks: nn.ModuleList) -> None:
    """Put another block list into a model in memory."""
    parent, _, name = arch.family.blocks.rpartition(".")
    setattr(model.get_submodule(parent), name, blocks)
