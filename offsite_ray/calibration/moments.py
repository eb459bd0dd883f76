# SPDX-License-Identifier: Apache-2.0
"""What goes into the linear layers of blocks, for compressions that look at it.

The second moment ``E[a a^T]`` over all tokens, ``(in, in)`` float32, is all that is kept of a
layer's inputs, on disk, one file a block: a block has a few, of which the largest is as large as
the square of its inner width.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

from offsite_ray.architectures import linear_layers, stored_alone
from offsite_ray.bundle import TensorDirectory, atomic_file, specs, write_file
from offsite_ray.calibration.files import block_files
from offsite_ray.calibration.forward import blockwise_forward
from offsite_ray.compression import MatrixStatistics

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from offsite_ray.full_model import FullModel
    from offsite_ray.training.protocols import Batch

_SEVERAL = "|"
"""Between the names of layers that are given the same inputs."""


class InputMoments:
    """The second moments of the inputs of linear layers, by the name of their weight on disk."""

    def __init__(
        self,
        full: FullModel,
        batches: Sequence[Batch],
        blocks: Collection[int],
        folder: Path | None,
    ) -> None:
        """Run sequences through the full model, as far as the moments are not there yet.

        Args:
            full: The full model, on disk.
            batches: Rows of text, nothing of it padding.
            blocks: Those whose layers are wanted.
            folder: Where they are kept and looked for; None: as long as this object is.
        """
        files = block_files(self, blocks, folder, partial(_write, full, batches))
        self._found: dict[str, tuple[TensorDirectory, str]] = {}
        for file in files:
            weights = TensorDirectory([file])
            for joined in weights.tensors:
                self._found |= dict.fromkeys(joined.split(_SEVERAL), (weights, joined))

    def __contains__(self, name: str) -> bool:
        """Return whether a weight is of a layer whose inputs are known."""
        return name in self._found

    def of(self, name: str) -> MatrixStatistics:
        """Return what is said of a weight: the moment of its inputs, or nothing."""
        if name not in self._found:
            return MatrixStatistics()
        weights, joined = self._found[name]
        return MatrixStatistics(inputs=weights.read(joined))


def _write(full: FullModel, batches: Sequence[Batch], files: Mapping[int, Path]) -> None:
    on_disk = stored_alone(full.config, full.arch, full.weights.tensors)

    @contextlib.contextmanager
    def measured(index: int, block: nn.Module) -> Iterator[None]:
        if index not in files:
            yield
            return
        prefix = f"{full.arch.family.blocks}.{index}."
        layers = {
            on_disk[f"{prefix}{path}.weight"]: layer
            for path, layer in linear_layers(block).items()
            if f"{prefix}{path}.weight" in on_disk
        }
        sums = _Sums(layers)
        yield
        sums.detach()
        with atomic_file(files[index]) as tmp:
            write_file(tmp, specs(sums.moments()))

    blockwise_forward(full, batches, lambda *_: None, around=measured)


class _Sums:
    """Sums over tokens of ``a a^T``, by layers that are given the same tensor."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._same: dict[str, list[str]] = {}
        self._last: tuple[Tensor, str] | None = None
        self._handles = [
            module.register_forward_pre_hook(self._hook(name)) for name, module in layers.items()
        ]

    def _hook(self, name: str) -> Any:
        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._last is not None and self._last[0] is args[0]:
                if name not in self._same[self._last[1]]:
                    self._same[self._last[1]].append(name)
                return
            self._last = (args[0], name)
            inputs = args[0].flatten(0, -2).float()
            moment = (inputs.T @ inputs).cpu()
            self._sums[name] = self._sums[name] + moment if name in self._sums else moment
            self._counts[name] = self._counts.get(name, 0) + len(inputs)
            self._same.setdefault(name, [name])

        return before

    def detach(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._last = None

    def moments(self) -> dict[str, Tensor]:
        """Return the means, under the names of all layers that they are of."""
        return {
            _SEVERAL.join(names): self._sums[first] / self._counts[first]
            for first, names in self._same.items()
        }
