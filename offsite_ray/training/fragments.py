# SPDX-License-Identifier: Apache-2.0
"""The state of a training run on disk, cut in pieces that any number of workers can read.

A fragment is a run of consecutive elements of one trained tensor or of one of AdamW's moments:
``parameter/NAME/START``. Every worker writes the fragments that it holds, whatever its engine has
cut them to; whoever goes on asks for the runs of elements that it needs. So a checkpoint knows
nothing of ZeRO stages or of the number of workers, holds nothing that does not train, and is plain
safetensors. The idea is that of DeepSpeed's universal checkpoints (Lian et al., arXiv 2406.18820),
without the conversion.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offsite_ray.bundle import TensorDirectory, specs, write_file
from offsite_ray.errors import IntegrityError

if TYPE_CHECKING:
    from pathlib import Path

PARAMETER = "parameter"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What torch's AdamW calls its two running means."""
KINDS = (PARAMETER, *MOMENTS)
"""Everything that training goes on from."""

Read = Callable[[str, str, int, int], Tensor]
"""``(kind, name, start, numel) -> (numel,)``: elements of a trained tensor or of a moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """A run of elements."""

    kind: str
    """``parameter``, ``exp_avg`` or ``exp_avg_sq``."""
    name: str
    """Parameter of the task's module."""
    start: int
    """First element, of the tensor laid out flat."""
    values: Tensor
    """``(numel,)`` float32, on the CPU."""


def write_fragments(path: Path, fragments: Iterable[Fragment]) -> str:
    """Write one worker's fragments as safetensors; return the file's digest."""
    named = {f"{f.kind}/{f.name}/{f.start}": f.values for f in fragments}
    return write_file(path, specs(named))


class FragmentReader:
    """The fragments of every worker, as whole tensors to read pieces from."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Look at the files' headers.

        Raises:
            IntegrityError: One is no whole safetensors file.
        """
        self._files = TensorDirectory(files)
        self._places: dict[tuple[str, str], list[tuple[int, int, str]]] = defaultdict(list)
        for key, info in self._files.tensors.items():
            kind, _, rest = key.partition("/")
            name, _, start = rest.rpartition("/")
            begin = int(start)
            self._places[kind, name].append((begin, begin + info.shape[0], key))

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return elements ``start`` to ``start + numel`` of a tensor, ``(numel,)`` float32.

        Raises:
            IntegrityError: Some of them are in no file.
        """
        result = torch.empty(numel)
        missing = numel
        for begin, end, key in self._places[kind, name]:
            first, last = max(begin, start), min(end, start + numel)
            if first < last:
                piece = self._files.view(key)[first - begin : last - begin]
                result[first - start : last - start] = piece
                missing -= last - first
        if missing:
            raise IntegrityError(f"{missing} of {numel} elements of {kind} {name!r} are missing")
        return result

    def whole(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return a trained tensor; one that a worker held whole is mapped, not read."""
        places = self._places[PARAMETER, name]
        if [place[:2] for place in places] == [(0, math.prod(shape))]:
            return self._files.view(places[0][2]).view(list(shape))
        return self.read(PARAMETER, name, 0, math.prod(shape)).view(list(shape))
