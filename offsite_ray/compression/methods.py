# SPDX-License-Identifier: Apache-2.0
"""The compression methods, one row each, and the text that names some of them in order."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offsite_ray.compression.low_rank import kept_rank, truncate, truncate_whitened
from offsite_ray.compression.packing import PACKED_BITS
from offsite_ray.compression.pruning import prune_pattern, prune_smallest
from offsite_ray.compression.quantization import GROUP_SIZE, quantize
from offsite_ray.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

NONE = "none"
"""What ``--compress`` says where nothing is to become of the matrices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A method with its parameters."""

    method: str
    source: str
    parameters: Mapping[str, int | float]
    apply: Callable[[Tensor, Tensor | None], Tensor]
    """``(matrix, moment of its inputs) -> matrix``, ``(out, in)``, ``(in, in)`` and ``(out, in)``,
    float32; what is given stays as it is."""
    needs_inputs: bool = False
    """Whether it looks at the moment ``E[a a^T]`` of the inputs, which takes text."""
    packed_bits: int | None = None
    """Bits in which the result can be stored; None: it is stored like any other tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionMethod:
    """A way to make matrices smaller or lossier."""

    name: str
    form: str
    """How it is asked for, in words."""
    make: Callable[[Sequence[str]], Step | None]
    """What stands behind its name, cut at the colons, to the step; None: not of its form."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compression:
    """What becomes of each matrix of the emulator blocks: some steps, in order."""

    text: str
    """As ``--compress`` gave it."""
    steps: tuple[Step, ...]

    @property
    def packed_bits(self) -> int | None:
        """Bits in which the matrices are stored; None: as the full model's are."""
        return self.steps[-1].packed_bits if self.steps else None

    @property
    def needs_inputs(self) -> bool:
        """Whether a step looks at what text makes of the inputs."""
        return any(step.needs_inputs for step in self.steps)

    def apply(self, matrix: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return what becomes of a matrix.

        Args:
            matrix: ``(out, in)`` float32, as is the result.
            inputs: ``E[a a^T]`` of its inputs, ``(in, in)`` float32; None where it is not known.
        """
        return _applied(self.steps, matrix, inputs)

    def before_packing(self, matrix: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return what becomes of a matrix before the last step, which quantizes it."""
        return _applied(self.steps[:-1], matrix, inputs)

    def recipe(self) -> dict[str, Any]:
        """Return the steps with their parameters, for a manifest."""
        steps = [
            {"method": step.method, **step.parameters, "source": step.source} for step in self.steps
        ]
        return {"method": self.text, "steps": steps}


def _applied(steps: Sequence[Step], matrix: Tensor, inputs: Tensor | None) -> Tensor:
    for step in steps:
        matrix = step.apply(matrix, inputs)
    return matrix


def parse_compression(text: str) -> Compression:
    """Return what a text such as ``"prune:2:4+quantize:8"`` asks for.

    Raises:
        ConfigError: It names no method, one with parameters that it does not take, or an order
            that makes no sense.
    """
    if text.strip() == NONE:
        return Compression(text=NONE, steps=())
    steps = tuple(_step(part.strip()) for part in text.split("+"))
    for step, following in itertools.pairwise(steps):
        if step.method == "quantize":
            raise ConfigError(
                f"compression {text!r} has {following.method} behind quantize, whose levels it "
                "would leave; put quantize last"
            )
    return Compression(text="+".join(part.strip() for part in text.split("+")), steps=steps)


def _step(part: str) -> Step:
    name, *words = part.split(":")
    if name == NONE:
        raise ConfigError(f"compression method {NONE!r} stands alone; leave out '+{NONE}'")
    if name not in COMPRESSION_METHODS:
        raise ConfigError(unknown_name("compression method", name, (*COMPRESSION_METHODS, NONE)))
    row = COMPRESSION_METHODS[name]
    step = row.make(words)
    if step is None:
        raise ConfigError(f"compression {part!r} is not of the form {row.form}")
    return step


def _number(word: str) -> float:
    """Return a number, or NaN, which is in no range."""
    try:
        return float(word)
    except ValueError:
        return math.nan


def _count(word: str) -> int:
    """Return a whole number, or 0, which counts nothing."""
    return int(word) if word.isascii() and word.isdecimal() else 0


def _prune(words: Sequence[str]) -> Step | None:
    if len(words) == 2:
        kept, group = map(_count, words)
        if not 0 < kept < group:
            return None
        return Step(
            method="prune",
            source="Mishra et al., arXiv 2104.08378",
            parameters={"kept": kept, "group": group},
            apply=lambda matrix, _: prune_pattern(matrix, kept, group),
        )
    ratio = _number(words[0]) if len(words) == 1 else math.nan
    if not 0 <= ratio < 1:
        return None
    return Step(
        method="prune",
        source="Han et al., arXiv 1506.02626, section 3",
        parameters={"ratio": ratio},
        apply=lambda matrix, _: prune_smallest(matrix, ratio),
    )


def _quantize(words: Sequence[str]) -> Step | None:
    bits = _count(words[0]) if len(words) == 1 else 0
    if not 1 <= bits <= 8:
        return None
    return Step(
        method="quantize",
        source="Wu et al., arXiv 2004.09602, section 3.1.2; groups: arXiv 1909.05840"
        if bits > 1
        else "Rastegari et al., arXiv 1603.05279, section 3.1; groups: arXiv 1909.05840",
        parameters={"bits": bits, "group_size": GROUP_SIZE},
        apply=lambda matrix, _: quantize(matrix, bits).dequantized(),
        packed_bits=bits if bits in PACKED_BITS else None,
    )


def _low_rank(words: Sequence[str]) -> Step | None:
    ratio = _number(words[0]) if len(words) == 1 else math.nan
    if not 0 < ratio <= 1:
        return None
    return Step(
        method="low_rank",
        source="Eckart and Young, 1936",
        parameters={"ratio": ratio},
        apply=lambda matrix, _: truncate(matrix, kept_rank(matrix, ratio)),
    )


def _low_rank_aware(words: Sequence[str]) -> Step | None:
    plain = _low_rank(words)
    if plain is None:
        return None
    ratio = plain.parameters["ratio"]

    def apply(matrix: Tensor, inputs: Tensor | None) -> Tensor:
        if inputs is None:
            return plain.apply(matrix, None)
        return truncate_whitened(matrix, inputs, kept_rank(matrix, ratio))

    return Step(
        method="low_rank_aware",
        source="SVD-LLM, Wang et al., arXiv 2403.07378, section 3.1",
        parameters={"ratio": ratio},
        apply=apply,
        needs_inputs=True,
    )


_ROWS = (
    CompressionMethod(
        name="prune",
        form="prune:RATIO (pruned share, 0 <= RATIO < 1, as prune:0.5) or prune:N:M (N of M "
        "neighbours stay, 0 < N < M, as prune:2:4)",
        make=_prune,
    ),
    CompressionMethod(
        name="quantize",
        form="quantize:BITS (1 to 8, as quantize:8; 8 and 4 are stored packed)",
        make=_quantize,
    ),
    CompressionMethod(
        name="low_rank",
        form="low_rank:RATIO (parameters of the two factors over those of the matrix, "
        "0 < RATIO <= 1, as low_rank:0.5)",
        make=_low_rank,
    ),
    CompressionMethod(
        name="low_rank_aware",
        form="low_rank_aware:RATIO (as low_rank, by what text makes of the inputs; takes "
        "--calibration)",
        make=_low_rank_aware,
    ),
)

COMPRESSION_METHODS: dict[str, CompressionMethod] = {row.name: row for row in _ROWS}
"""Every compression method by the name that ``--compress`` takes; beside them, ``none``."""
