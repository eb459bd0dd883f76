# SPDX-License-Identifier: Apache-2.0
"""Calibration: what the full model does on a little text, for whoever selects or compresses blocks.

The full model is read block by block, each once for all sequences, so it needs to fit in no memory;
what is found is kept in the user's cache, by model, text and version.
"""

from offsite_ray.calibration.forward import blockwise_forward
from offsite_ray.calibration.gradients import GradientScores
from offsite_ray.calibration.moments import InputMoments
from offsite_ray.calibration.run import Calibration, calibrate
from offsite_ray.calibration.signals import BlockSignals, block_signals

__all__ = [
    "BlockSignals",
    "Calibration",
    "GradientScores",
    "InputMoments",
    "block_signals",
    "blockwise_forward",
    "calibrate",
]
