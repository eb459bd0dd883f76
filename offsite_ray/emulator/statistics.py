# SPDX-License-Identifier: Apache-2.0
"""What a compression wants to know of the text that goes through the full model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offsite_ray.calibration import calibrate
from offsite_ray.compression import MatrixStatistics, parse_compression
from offsite_ray.errors import ConfigError
from offsite_ray.selection import selection_method

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from offsite_ray.architectures import Notice
    from offsite_ray.calibration import Calibration, GradientScores, InputMoments
    from offsite_ray.compression import Compression
    from offsite_ray.config import CompressConfig
    from offsite_ray.emulator.choosing import ChosenBlocks
    from offsite_ray.full_model import FullModel


def check_text(compression: Compression, config: CompressConfig) -> None:
    """Refuse a compression that needs text where there is none, and text that nobody needs.

    Raises:
        ConfigError: It is so.
    """
    if compression.needs and not config.calibration:
        raise ConfigError(
            f"--compress {compression.text} looks at what the full model does with text; give some "
            "with --calibration FILE"
        )
    if config.calibration and not looks_at_text(config.select, config.compress):
        raise ConfigError(
            f"--calibration is for methods that look at text, and neither --select {config.select} "
            f"nor --compress {config.compress} does; leave it out, or choose another method"
        )


def looks_at_text(select: str, compress: str) -> bool:
    """Return whether a selection or a compression wants to see the full model at work.

    Raises:
        OffsiteError: One of them is unknown.
    """
    return selection_method(select).needs_text or bool(parse_compression(compress).needs)


class Statistics:
    """What some text says of the matrices of emulator blocks; nothing, where nobody asks."""

    def __init__(self, sources: Sequence[InputMoments | GradientScores], recipe: Mapping[str, Any]):
        """Take the sources, each of one need.

        Args:
            sources: What was measured.
            recipe: What there is to say of how.
        """
        self._sources = sources
        self.recipe = recipe

    def of(self, name: str) -> MatrixStatistics:
        """Return what is said of a matrix of the full model, by its name on disk."""
        merged = MatrixStatistics()
        for source in self._sources:
            said = source.of(name)
            merged = MatrixStatistics(
                inputs=said.inputs if merged.inputs is None else merged.inputs,
                components=said.components or merged.components,
                channels=said.channels or merged.channels,
                channel_axis=said.channel_axis or merged.channel_axis,
            )
        return merged


def measure(
    full: FullModel,
    chosen: ChosenBlocks,
    compression: Compression,
    matrices: Collection[str],
    config: CompressConfig,
    notice: Notice | None,
) -> Statistics:
    """Return what a compression wants to know of the matrices of emulator blocks.

    Args:
        full: The full model.
        chosen: The blocks of the bundle.
        compression: Which may not want to know anything.
        matrices: Names of the matrices in blocks.
        config: Text, and how much of it.
        notice: Told of matrices of which nothing can be known.
    """
    if not compression.needs or not chosen.plan.emulator:
        return Statistics((), {})
    calibration: Calibration = calibrate(full, config, notice)
    places = zip(chosen.plan.kept, chosen.stored, strict=True)
    blocks = {stored for index, stored in places if index in chosen.plan.emulator}
    blocks -= chosen.replaced
    sources = [calibration.statistics(need, sorted(blocks)) for need in sorted(compression.needs)]
    unknown = sorted(
        name
        for name in matrices
        if full.arch.block_of(name) in blocks and not all(name in each for each in sources)
    )
    if unknown and notice is not None:
        notice(
            f"{len(unknown)} matrices, {unknown[0]!r} among them, are of no linear layer of their "
            "own: they are cut to their rank without regard to the text"
        )
    return Statistics(sources, {"calibration": calibration.recipe})
