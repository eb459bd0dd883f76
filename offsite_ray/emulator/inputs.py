# SPDX-License-Identifier: Apache-2.0
"""What a compression wants to know of the text that goes through the full model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offsite_ray.calibration import InputMoments, calibrate
from offsite_ray.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection

    from offsite_ray.architectures import Notice
    from offsite_ray.compression import Compression
    from offsite_ray.config import CompressConfig
    from offsite_ray.emulator.choosing import ChosenBlocks
    from offsite_ray.full_model import FullModel


def check_text(compression: Compression, config: CompressConfig) -> None:
    """Refuse a compression that needs text where there is none; raise :class:`ConfigError`."""
    if compression.needs_inputs and not config.calibration:
        raise ConfigError(
            f"--compress {compression.text} looks at what the full model does with text; give some "
            "with --calibration FILE"
        )


def measured_inputs(
    full: FullModel,
    chosen: ChosenBlocks,
    compression: Compression,
    matrices: Collection[str],
    config: CompressConfig,
    notice: Notice | None,
) -> tuple[InputMoments | None, dict[str, Any]]:
    """Return what is known of the inputs of emulator blocks' layers, and its recipe.

    Args:
        full: The full model.
        chosen: The blocks of the bundle.
        compression: Which may not want to know.
        matrices: Names of the matrices in blocks.
        config: Text, and how much of it.
        notice: Told of matrices whose inputs cannot be known.
    """
    if not compression.needs_inputs or not chosen.plan.emulator:
        return None, {}
    calibration = calibrate(full, config, notice)
    places = zip(chosen.plan.kept, chosen.stored, strict=True)
    blocks = {stored for index, stored in places if index in chosen.plan.emulator}
    inputs = calibration.input_moments(blocks)
    unknown = sorted(n for n in matrices if full.arch.block_of(n) in blocks and n not in inputs)
    if unknown and notice is not None:
        notice(
            f"{len(unknown)} matrices, {unknown[0]!r} among them, are of no linear layer of their "
            "own: they are compressed without regard to their inputs"
        )
    return inputs, {"calibration": calibration.recipe}
