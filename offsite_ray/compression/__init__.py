# SPDX-License-Identifier: Apache-2.0
"""What becomes of an emulator block's matrices: methods, their parameters, their composition.

Everything here is a function of matrices ``(out, in)`` in float32: ``out`` channels, each of which
is a weighted sum of ``in`` inputs. Which tensors are matrices, and which way round they are stored,
is known elsewhere.
"""

from offsite_ray.compression.methods import (
    COMPRESSION_METHODS,
    Compression,
    CompressionMethod,
    Step,
    parse_compression,
)
from offsite_ray.compression.packing import PACKED_BITS, PackedTensor, pack
from offsite_ray.compression.quantization import GROUP_SIZE, Quantized, quantize
from offsite_ray.compression.statistics import MatrixStatistics, Need

__all__ = [
    "COMPRESSION_METHODS",
    "GROUP_SIZE",
    "PACKED_BITS",
    "Compression",
    "CompressionMethod",
    "MatrixStatistics",
    "Need",
    "PackedTensor",
    "Quantized",
    "Step",
    "pack",
    "parse_compression",
    "quantize",
]
