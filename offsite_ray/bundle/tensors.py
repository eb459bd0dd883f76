# SPDX-License-Identifier: Apache-2.0
"""Safetensors on disk, found by name and read on demand, one tensor or a piece of one at a time.

A model is never loaded here. The header of every file is checked against the file before a byte of
it is believed (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.architectures.packed import PACKED_STEM
from offsite_ray.bundle.digest import unique_names
from offsite_ray.bundle.windows import mapped, windows
from offsite_ray.errors import IntegrityError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls a dtype, and torch."""

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Where a tensor is, and what."""

    name: str
    file: Path
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""
    end: int
    """Byte after its last."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin

    @property
    def layout(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape."""
        return self.dtype, self.shape


class TensorDirectory:
    """The tensors of a model directory, read on demand."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Read and check the headers of the files.

        Raises:
            IntegrityError: A header does not fit its file, or two files hold one name.
        """
        self.files = tuple(files)
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            for info in read_header(file):
                if info.name in self.tensors:
                    raise IntegrityError(f"tensor {info.name!r} is in {file} and in another file")
                self.tensors[info.name] = info

    @classmethod
    def of_model(cls, directory: Path) -> TensorDirectory:
        """Return the weights of a Hugging Face model directory.

        Raises:
            StorageError: It has no safetensors.
            IntegrityError: Its index and its files disagree.
        """
        if (directory / INDEX).is_file():
            found = cls._of_index(directory)
            if (directory / WEIGHTS).is_file() and found.files != (directory / WEIGHTS,):
                raise IntegrityError(
                    f"{directory} holds {WEIGHTS}, which transformers reads, beside {INDEX} of "
                    "other files; remove the one that is not meant"
                )
            return found
        if (directory / WEIGHTS).is_file():
            return cls([directory / WEIGHTS])
        if any(directory.glob(f"{PACKED_STEM}*.safetensors")):
            raise StorageError(
                f"{directory} has no {WEIGHTS} but packed weights; write a stock model of it with "
                "'offsite-ray unpack'"
            )
        pickles = [*directory.glob("*.bin"), *directory.glob("*.pt")]
        hint = (
            "it has pickled weights, which are never read: save them as safetensors"
            if pickles
            else "give the directory of a model"
        )
        raise StorageError(f"{directory} has no {WEIGHTS}; {hint}")

    @classmethod
    def _of_index(cls, directory: Path) -> TensorDirectory:
        index = directory / INDEX
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
            paths = {name: Path(name) for name in names}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(f"{index} is no index of safetensors: {error!r}") from error
        for name in names:
            if paths[name].name != name or not name.endswith(".safetensors"):
                raise IntegrityError(f"{index} names {name!r}, which is no file beside it")
            if not (directory / name).is_file():
                raise IntegrityError(f"{index} names {name!r}, which is missing")
        found = cls([directory / name for name in names])
        if {n: i.file.name for n, i in found.tensors.items()} != weight_map:
            raise IntegrityError(f"{index} and the files beside it name different tensors")
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def of_file(self, file: Path) -> list[TensorInfo]:
        """Return the tensors of one of the files, in the order of their bytes."""
        return [info for info in self.tensors.values() if info.file == file]

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor, to be read only, in order."""
        info = self.tensors[name]
        with info.file.open("rb") as file:
            yield from windows(file, info.begin, info.end)

    def data(self, name: str) -> memoryview:
        """Return the bytes of a tensor, in memory as long as they are held."""
        info = self.tensors[name]
        with info.file.open("rb") as file:
            return mapped(file, info.begin, info.end, mmap.ACCESS_COPY)

    def view(self, name: str) -> Tensor:
        """Return a tensor as it is stored, without copying it where that can be avoided."""
        info = self.tensors[name]
        dtype = TORCH_DTYPES[info.dtype]
        if info.begin % dtype.itemsize or not info.nbytes:
            return self.read(name)
        return torch.frombuffer(self.data(name), dtype=dtype).view(info.shape)

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored, in memory of its own."""
        return read_tensor(self.tensors[name])

    def sample(self, name: str, starts: Sequence[int], size: int) -> bytes:
        """Return some bytes of a tensor: ``size`` from each of the places, or as many as it has."""
        info = self.tensors[name]
        with info.file.open("rb", buffering=0) as file:
            found = []
            for start in starts:
                file.seek(info.begin + start)
                found.append(file.read(min(size, info.nbytes - start)))
        return b"".join(found)


def read_tensor(info: TensorInfo) -> Tensor:
    """Return a tensor as it is stored, in memory of its own."""
    if not info.nbytes:
        return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
    flat = torch.empty(info.nbytes, dtype=torch.uint8)
    rest = memoryview(flat.numpy())  # type: ignore[arg-type]
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.begin)
        while rest:
            got = file.readinto(rest)
            if not got:
                raise IntegrityError(f"{info.file} ended while {info.name!r} was read")
            rest = rest[got:]
    return flat.view(TORCH_DTYPES[info.dtype]).view(info.shape)


def read_header(file: Path) -> list[TensorInfo]:
    """Return the tensors of a safetensors file in the order of their bytes.

    Raises:
        IntegrityError: The header is not one, or the tensors do not exactly fill the file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise IntegrityError(
                    f"{file} is truncated or no safetensors file: {size} bytes, with a header of "
                    f"{length}"
                )
            header = json.loads(stream.read(length), object_pairs_hook=unique_names)
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{file} has a header that is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise IntegrityError(f"{file} has a header that is no JSON object")
    header.pop("__metadata__", None)
    infos = sorted(
        (_info(file, name, entry, 8 + length) for name, entry in header.items()),
        key=lambda info: (info.begin, info.end),
    )
    position = 8 + length
    for info in infos:
        if info.begin != position:
            raise IntegrityError(f"{file}: tensor {info.name!r} overlaps another or leaves a hole")
        position = info.end
    if position != size:
        raise IntegrityError(
            f"{file} has {size} bytes where its header promises {position}: it is truncated or has "
            "something appended"
        )
    return infos


def _info(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError("a negative or fractional number")
        if end - begin != math.prod(shape) * TORCH_DTYPES[dtype].itemsize:
            raise ValueError(f"{end - begin} bytes for {list(shape)} of {dtype}")
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{file}: tensor {name!r} has a bad header: {error!r}") from error
    return TensorInfo(
        name=name, file=file, dtype=dtype, shape=shape, begin=start + begin, end=start + end
    )


def all_finite(tensor: Tensor) -> bool:
    """Return whether no value of a tensor is infinite or not a number."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    # What torch cannot compare is of one byte a value.
    comparable = tensor.float() if tensor.element_size() == 1 else tensor
    # The extremes are not finite if any value is not, and take no memory.
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(comparable))
