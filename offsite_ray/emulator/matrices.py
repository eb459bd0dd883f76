# SPDX-License-Identifier: Apache-2.0
"""Matrices of the full model on their way into a bundle: read, compressed, stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from offsite_ray.architectures.packed import PACKED_DTYPES
from offsite_ray.bundle import TORCH_DTYPES, all_finite, lazy_spec, new_hasher, packed_specs
from offsite_ray.compression import PackedTensor
from offsite_ray.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor

    from offsite_ray.bundle import TensorSpec
    from offsite_ray.compression import Compression
    from offsite_ray.emulator.statistics import Statistics
    from offsite_ray.full_model import FullModel


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixToCompress:
    """A matrix of the full model that the bundle holds in another form."""

    full: FullModel
    name: str
    """In the full model."""
    transposed: bool
    """Whether it is stored as ``(in, out)``."""
    compression: Compression
    statistics: Statistics
    carried: dict[str, str]
    """Gets the digest of the tensor as the full model has it."""

    def specs(self, own_name: str) -> list[TensorSpec]:
        """Return what the bundle holds of it, made when its turn comes.

        Args:
            own_name: Its name in the bundle.
        """
        packed = self.packed()
        if packed is not None:
            return packed_specs(
                own_name,
                packed,
                lambda: self.compression.before_packing(
                    self._read(), self.statistics.of(self.name)
                ),
            )
        info = self.full.weights.tensors[self.name]
        return [lazy_spec(own_name, info.dtype, info.shape, self._compressed)]

    def packed(self) -> PackedTensor | None:
        """Return how it is packed; None where it is not."""
        bits, info = self.compression.packed_bits, self.full.weights.tensors[self.name]
        if bits is None:
            return None
        rows, columns = info.shape
        return PackedTensor(
            bits=bits,
            shape=(rows, columns),
            dtype=TORCH_DTYPES[info.dtype],
            transposed=self.transposed,
        )

    def check(self) -> None:
        """Refuse a matrix whose numbers are not what it computes with.

        Raises:
            IntegrityError: It is stored in another dtype than those of floating-point weights.
        """
        dtype = TORCH_DTYPES[self.full.weights.tensors[self.name].dtype]
        if dtype not in PACKED_DTYPES.values():
            raise IntegrityError(
                f"tensor {self.name!r} is stored as {dtype}, and only "
                f"{', '.join(PACKED_DTYPES)} can be compressed; use --compress none"
            )

    def _compressed(self) -> Tensor:
        matrix = self.compression.apply(self._read(), self.statistics.of(self.name))
        dtype = TORCH_DTYPES[self.full.weights.tensors[self.name].dtype]
        return (matrix.T if self.transposed else matrix).to(dtype)

    def _read(self) -> Tensor:
        """Return the matrix as ``(out, in)`` float32."""
        hasher = new_hasher()
        for piece in self.full.weights.pieces(self.name):
            hasher.update(piece)
        self.carried[self.name] = hasher.hexdigest()
        tensor = self.full.weights.read(self.name)
        if not all_finite(tensor):
            raise IntegrityError(
                f"tensor {self.name!r} of {self.full.path} holds values that are not finite, which "
                "cannot be compressed; use --compress none"
            )
        matrix = tensor.to(torch.float32)
        return matrix.T.contiguous() if self.transposed else matrix
