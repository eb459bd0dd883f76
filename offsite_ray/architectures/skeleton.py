# SPDX-License-Identifier: Apache-2.0
"""A model without its blocks: what each of them is given, whatever the family.

Everything outside the blocks is loaded and runs as in transformers: embeddings, masks, rotary
embeddings. In the place of each block is a module that notes the call. So blocks can be run one
after the other, each for many batches, while no more than one of them is in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offsite_ray.architectures.detection import get_blocks, model_class, set_blocks
from offsite_ray.architectures.families import used
from offsite_ray.architectures.standin import StandIn
from offsite_ray.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers.configuration_utils import PretrainedConfig

    from offsite_ray.architectures.detection import Architecture


@dataclass(frozen=True, slots=True)
class BlockCall:
    """What a model gives a block beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the hidden states ``(B, T, H)`` behind a block."""
        output = block(hidden, *self.args, **self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


class _Notes:
    """What the places of a model note."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.calls: list[BlockCall] = []
        self.as_tuple = False
        """Whether the hidden states are the first of what a block returns."""


class _Place(StandIn):
    """The place of a block."""

    attributes_of = "block"

    def __init__(self, block: nn.Module, notes: _Notes) -> None:
        super().__init__()
        self.__dict__["block"] = block  # no child: it is neither loaded nor run
        self._notes = notes

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Note the call. What is returned goes to the next place, which does not look at it.

        What the last one returns is what the model goes on with.
        """
        if self._notes.hidden is None:
            self._notes.hidden = hidden_states
        self._notes.calls.append(BlockCall(args, kwargs))
        return (self._notes.hidden,) if self._notes.as_tuple else self._notes.hidden


class Skeleton:
    """A model without its blocks."""

    def __init__(
        self,
        config: PretrainedConfig,
        arch: Architecture,
        disk: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        """Load what is outside the blocks.

        Args:
            config: Of the whole model.
            arch: Its architecture.
            disk: Name on disk to tensor, of those that belong to no block.
            dtype: Of the weights in memory.

        Raises:
            IntegrityError: A tensor is missing, too many, or of the wrong shape.
        """
        from offsite_ray.architectures.loading import quiet_transformers

        self._notes = notes = _Notes()
        cls = model_class(config, arch.family.auto_class)

        def without_blocks(model: Any, config: PretrainedConfig) -> None:
            cls.__init__(model, config)  # on the meta device: no memory
            places = [_Place(block, notes) for block in get_blocks(model, arch)]
            set_blocks(model, arch, nn.ModuleList(places))

        # By name and module transformers knows what to rename and convert while it loads.
        own = {"__init__": without_blocks, "__module__": cls.__module__}
        skeleton = type(cls.__name__, (cls,), own)
        with quiet_transformers():
            model, info = skeleton.from_pretrained(  # type: ignore[attr-defined]
                None,
                config=config,
                state_dict=dict(disk),
                dtype=dtype,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
        wrong = [
            *info["missing_keys"],
            *used(config.model_type, info["unexpected_keys"]),
            *map(str, info["mismatched_keys"]),
        ]
        if wrong:
            raise IntegrityError(f"tensor {wrong[0]!r} is missing, unknown or of the wrong shape")
        self.model: Any = model.eval()

    def begin(self, input_ids: Tensor, **positions: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """Return the hidden states before the first block ``(B, T, H)``, and each block's call.

        Args:
            input_ids: ``(B, T)``, nothing of it padding.
            **positions: ``position_ids``, ``(B, T)``, where documents are packed.
        """
        self._notes.hidden, self._notes.calls = None, []
        self.model.base_model(input_ids=input_ids, use_cache=False, **positions)
        assert self._notes.hidden is not None
        return self._notes.hidden, self._notes.calls

    def end(self, hidden: Tensor, input_ids: Tensor, **positions: Tensor) -> Tensor:
        """Return what the model's head is given, ``(B, T, H)``.

        Args:
            hidden: Behind the last block, ``(B, T, H)``; may need a gradient.
            input_ids: ``(B, T)``, as :meth:`begin` was given it.
            **positions: Likewise.
        """
        self._notes.hidden = hidden
        behind = self._behind(input_ids, positions)
        if (
            behind.shape[:-1] != hidden.shape[:-1]
        ):  # a model that takes the first of what a block returns
            self._notes.as_tuple = True
            behind = self._behind(input_ids, positions)
        self._notes.hidden = None
        return behind

    def _behind(self, input_ids: Tensor, positions: Mapping[str, Tensor]) -> Tensor:
        self._notes.calls = []
        output = self.model.base_model(input_ids=input_ids, use_cache=False, **positions)
        behind: Tensor = output.last_hidden_state
        return behind
