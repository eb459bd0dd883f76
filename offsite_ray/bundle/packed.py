# SPDX-License-Identifier: Apache-2.0
"""The weights of a packed bundle on disk, read and written one tensor at a time."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from offsite_ray.architectures import config_values
from offsite_ray.architectures.packed import (
    PACKED_STEM,
    PACKED_TYPE,
    packed_files,
    packed_tensors,
)
from offsite_ray.bundle.shards import TensorSpec, lazy_spec, tensor_bytes, write_shards
from offsite_ray.bundle.tensors import DTYPE_NAMES, TensorDirectory, TensorInfo, read_tensor
from offsite_ray.compression import pack, quantize
from offsite_ray.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from offsite_ray.compression import PackedTensor


class PackedDirectory(TensorDirectory):
    """The tensors of a packed bundle as what they unpack to, by the names that they then have.

    The info of a packed one has its shape and dtype, and the place of its stored values.
    """

    def __init__(self, files: Sequence[Path], packed: Mapping[str, PackedTensor]) -> None:
        """Read and check the headers of the files.

        Raises:
            IntegrityError: A header does not fit its file, or a packed tensor not its parts.
        """
        super().__init__(files)
        self.packed = dict(packed)
        self._nbytes = super().nbytes
        self._parts: dict[str, tuple[TensorInfo, TensorInfo]] = {}
        for name, tensor in self.packed.items():
            values, scales = (self._part(name, part) for part in tensor.part_names(name))
            expected = [(DTYPE_NAMES[dtype], shape) for dtype, shape in tensor.part_layouts]
            if [values.layout, scales.layout] != expected:
                raise IntegrityError(
                    f"the parts of tensor {name!r} are {values.layout} and {scales.layout} where "
                    f"config.json promises {expected[0]} and {expected[1]}"
                )
            if name in self.tensors:
                raise IntegrityError(f"tensor {name!r} is in {values.file} packed and as it is")
            self._parts[name] = (values, scales)
            self.tensors[name] = dataclasses.replace(
                values, name=name, dtype=DTYPE_NAMES[tensor.dtype], shape=tensor.shape
            )

    def _part(self, name: str, part: str) -> TensorInfo:
        if part not in self.tensors:
            raise IntegrityError(f"tensor {name!r} lacks {part!r}, a part of its packed form")
        return self.tensors.pop(part)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return self._nbytes

    def parts(self, name: str) -> list[TensorSpec]:
        """Return what is stored of a packed tensor as something to write, as it is."""
        return [
            lazy_spec(info.name, info.dtype, info.shape, lambda info=info: read_tensor(info))  # type: ignore[misc]
            for info in self._parts[name]
        ]

    def read(self, name: str) -> Tensor:
        """Return a tensor, unpacked, in memory of its own."""
        if name not in self._parts:
            return super().read(name)
        values, scales = map(read_tensor, self._parts[name])
        return self.packed[name].unpack(values, scales)

    def view(self, name: str) -> Tensor:
        """Return a tensor, unpacked."""
        return self.read(name) if name in self._parts else super().view(name)

    def data(self, name: str) -> memoryview:
        """Return the bytes of a tensor, unpacked."""
        return tensor_bytes(self.read(name)) if name in self._parts else super().data(name)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor, unpacked, in order."""
        if name in self._parts:
            yield self.data(name)
        else:
            yield from super().pieces(name)

    def sample(self, name: str, starts: Sequence[int], size: int) -> bytes:
        """Return some bytes of a tensor, unpacked."""
        if name not in self._parts:
            return super().sample(name, starts, size)
        data = self.data(name)
        return b"".join(data[start : start + size] for start in starts)


def open_weights(directory: Path) -> TensorDirectory:
    """Return the weights of a model directory, packed or not.

    Raises:
        StorageError: It has none.
        IntegrityError: They contradict themselves, or ``config.json``.
    """
    values = config_values(directory)
    if values.get("model_type") != PACKED_TYPE:
        return TensorDirectory.of_model(directory)
    files = packed_files(directory)
    if not files:
        raise IntegrityError(
            f"{directory} has no {PACKED_STEM}.safetensors, unlike its config.json"
        )
    return PackedDirectory(files, packed_tensors(values))


def packed_specs(name: str, tensor: PackedTensor, make: Callable[[], Tensor]) -> list[TensorSpec]:
    """Return the parts of a tensor that is packed when its turn comes.

    Args:
        name: Of the tensor.
        tensor: How to pack it.
        make: Called once; returns the matrix, ``(out, in)`` float32, whichever way round the tensor
            is.
    """
    scales: list[Tensor] = []

    def values() -> Tensor:
        quantized = quantize(make(), tensor.bits)
        scales.append(quantized.scales)
        return pack(quantized, tensor.bits)

    layouts = [(DTYPE_NAMES[dtype], shape) for dtype, shape in tensor.part_layouts]
    # The values are written first; the scales, which are small, wait for their turn.
    makers = (values, lambda: scales.pop())
    return [
        lazy_spec(part, dtype, shape, maker)
        for part, (dtype, shape), maker in zip(
            tensor.part_names(name), layouts, makers, strict=True
        )
    ]


def write_packed(directory: Path, tensors: Iterable[TensorSpec]) -> dict[str, str]:
    """Write the weights of a packed bundle; return file name to digest."""
    return write_shards(directory, PACKED_STEM, tensors)[0]
