# SPDX-License-Identifier: Apache-2.0
"""The compression methods, one row each, and the text that names some of them in order."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offsite_ray.compression.gradient_preserving import keep_components, remove_channels
from offsite_ray.compression.low_rank import kept_rank, truncate, truncate_whitened
from offsite_ray.compression.packing import PACKED_BITS
from offsite_ray.compression.pruning import prune_pattern, prune_smallest
from offsite_ray.compression.quantization import GROUP_SIZE, quantize
from offsite_ray.compression.statistics import NOTHING_SAID, MatrixStatistics, Need
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
    apply: Callable[[Tensor, MatrixStatistics], Tensor]
    """``(matrix, what text says of it) -> matrix``, ``(out, in)`` float32 each; the given one stays
    as it is."""
    needs: Need | None = None
    """What it wants to know of the matrix, which takes text."""
    makes_zeros: bool = False
    """Whether what it takes from a matrix are weights or channels, which are zero from then on."""
    fills_zeros: bool = False
    """Whether what was zero before it is so no more."""
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
    def needs(self) -> frozenset[Need]:
        """What the steps want to know of a matrix."""
        return frozenset(step.needs for step in self.steps if step.needs is not None)

    def apply(self, matrix: Tensor, said: MatrixStatistics = NOTHING_SAID) -> Tensor:
        """Return what becomes of a matrix.

        Args:
            matrix: ``(out, in)`` float32, as is the result.
            said: What text says of it, as far as that is known.
        """
        return _applied(self.steps, matrix, said)

    def before_packing(self, matrix: Tensor, said: MatrixStatistics = NOTHING_SAID) -> Tensor:
        """Return what becomes of a matrix before the last step, which quantizes it."""
        return _applied(self.steps[:-1], matrix, said)

    def recipe(self) -> dict[str, Any]:
        """Return the steps with their parameters, for a manifest."""
        steps = [
            {"method": step.method, **step.parameters, "source": step.source} for step in self.steps
        ]
        return {"method": self.text, "steps": steps}


def _applied(steps: Sequence[Step], matrix: Tensor, said: MatrixStatistics) -> Tensor:
    for step in steps:
        matrix = step.apply(matrix, said)
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
        if following.method == "gradient_preserving":
            raise ConfigError(
                f"compression {text!r} has gradient_preserving behind {step.method}, which changes "
                "the matrices that its gradients are of; put gradient_preserving first"
            )
        if step.method == "quantize":
            raise ConfigError(
                f"compression {text!r} has {following.method} behind quantize, whose levels it "
                "would leave; put quantize last"
            )
    for step, later in itertools.combinations(steps, 2):
        if step.makes_zeros and later.fills_zeros:
            raise ConfigError(
                f"compression {text!r} has {later.method} behind {step.method}, whose zeros it "
                "would fill again; leave one of the two out"
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
            makes_zeros=True,
        )
    ratio = _number(words[0]) if len(words) == 1 else math.nan
    if not 0 <= ratio < 1:
        return None
    return Step(
        method="prune",
        source="Han et al., arXiv 1506.02626, section 3",
        parameters={"ratio": ratio},
        apply=lambda matrix, _: prune_smallest(matrix, ratio),
        makes_zeros=True,
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
        fills_zeros=bits == 1,  # there is a level on either side of zero, and none at it
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
        fills_zeros=True,
    )


def _low_rank_aware(words: Sequence[str]) -> Step | None:
    plain = _low_rank(words)
    if plain is None:
        return None
    ratio = plain.parameters["ratio"]

    def apply(matrix: Tensor, said: MatrixStatistics) -> Tensor:
        if said.inputs is None:
            return plain.apply(matrix, said)
        return truncate_whitened(matrix, said.inputs, kept_rank(matrix, ratio))

    return Step(
        method="low_rank_aware",
        source="SVD-LLM, Wang et al., arXiv 2403.07378, section 3.1",
        parameters={"ratio": ratio},
        apply=apply,
        needs="inputs",
        fills_zeros=True,
    )


def _gradient_preserving(words: Sequence[str]) -> Step | None:
    numbers = [_number(word) for word in words]
    if not 2 <= len(numbers) <= 3 or not 0 < numbers[0] <= 1:
        return None
    ratio, privacy, inner_privacy = numbers[0], numbers[1], numbers[-1]
    if not all(0 <= number < math.inf for number in numbers):
        return None

    def apply(matrix: Tensor, said: MatrixStatistics) -> Tensor:
        if said.components is not None:
            total = said.components.total(privacy)
            return keep_components(matrix, total, kept_rank(matrix, ratio))
        if said.channels is not None:
            total = said.channels.total(inner_privacy)
            count = len(total) - max(1, round(ratio * len(total)))
            return remove_channels(matrix, total, count, said.channel_axis)
        return truncate(matrix, kept_rank(matrix, ratio))

    return Step(
        method="gradient_preserving",
        source="GradOT, Yao et al., arXiv 2507.04455",
        parameters={"ratio": ratio, "privacy": privacy, "inner_privacy": inner_privacy},
        apply=apply,
        needs="gradients",
        makes_zeros=True,
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
    CompressionMethod(
        name="gradient_preserving",
        form="gradient_preserving:RATIO:PRIVACY or gradient_preserving:RATIO:PRIVACY:PRIVACY "
        "(parameters that stay, 0 < RATIO <= 1; weight of the emulator's own loss, 0 or more, in "
        "attention and in the feed-forward, as gradient_preserving:0.5:1; takes --calibration)",
        make=_gradient_preserving,
    ),
)

COMPRESSION_METHODS: dict[str, CompressionMethod] = {row.name: row for row in _ROWS}
"""Every compression method by the name that ``--compress`` takes; beside them, ``none``."""
