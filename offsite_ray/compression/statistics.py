# SPDX-License-Identifier: Apache-2.0
"""What some text says of a matrix, as far as a compression looks at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from offsite_ray.compression.gradient_preserving import Scores

Need = Literal["inputs", "gradients"]
"""What a method wants: inputs of layers, or gradients too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixStatistics:
    """Means over the tokens of a text; None: not asked for, or not to be had of this matrix."""

    inputs: Tensor | None = None
    """``E[a a^T]`` of the inputs, ``(in, in)`` float32."""
    components: Scores | None = None
    """What removing a singular component scores; of matrices outside a feed-forward."""
    channels: Scores | None = None
    """What removing an inner channel scores, over all matrices of a feed-forward."""
    channel_axis: int = 0
    """0 where an inner channel is a row of this matrix, 1 where it is a column."""


NOTHING_SAID = MatrixStatistics()
"""Of a matrix of which nothing is known."""
