# SPDX-License-Identifier: Apache-2.0
"""Safetensors on disk, one tensor at a time: reading, streaming out, overwriting in a copy.

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

from offsite_ray.bundle.atomic import link_or_copy
from offsite_ray.bundle.digest import DigestingFile, canonical_json, digest_file, unique_names
from offsite_ray.errors import IntegrityError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

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

_MAX_SHARD_BYTES = 5 * 10**9
"""Above which a new file begins, as in transformers."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """A tensor that is yet to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], bytes | memoryview]
    """Called once, when the tensor's turn comes."""

    @property
    def nbytes(self) -> int:
        """Bytes that ``data`` returns."""
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


class TensorDirectory:
    """The tensors of a model directory, mapped into memory and read on demand."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Read and check the headers of the files.

        Raises:
            IntegrityError: A header does not fit its file, or two files hold one name.
        """
        self.files = tuple(files)
        self.tensors: dict[str, TensorInfo] = {}
        self._maps: dict[Path, mmap.mmap] = {}
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

    def data(self, name: str) -> memoryview:
        """Return the bytes of a tensor, without copying them."""
        info = self.tensors[name]
        if info.file not in self._maps:
            with info.file.open("rb") as file:
                self._maps[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(self._maps[info.file])[info.begin : info.end]

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored, in memory of its own."""
        info = self.tensors[name]
        if not info.nbytes:
            return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        flat = torch.frombuffer(bytearray(self.data(name)), dtype=TORCH_DTYPES[info.dtype])
        return flat.view(info.shape)


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


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, row-major."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def specs(tensors: Mapping[str, Tensor]) -> list[TensorSpec]:
    """Return tensors in memory as something to write, by name."""
    return [
        TensorSpec(
            name=name,
            dtype=DTYPE_NAMES[tensor.dtype],
            shape=tuple(tensor.shape),
            data=lambda tensor=tensor: tensor_bytes(tensor),  # type: ignore[misc]
        )
        for name, tensor in sorted(tensors.items())
    ]


def write_file(path: Path, tensors: Sequence[TensorSpec]) -> str:
    """Write one safetensors file, one tensor at a time; return its digest."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in tensors:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with DigestingFile(path) as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for spec in tensors:
            out.write(spec.data())
        return out.digest


def write_model(
    directory: Path, tensors: Iterable[TensorSpec], max_shard_bytes: int = _MAX_SHARD_BYTES
) -> dict[str, str]:
    """Write a model's weights as transformers reads them; return file name to digest."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in tensors:
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    if len(shards) == 1:
        return {WEIGHTS: write_file(directory / WEIGHTS, shards[0])}
    digests, weight_map = {}, {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        digests[name] = write_file(directory / name, shard)
        weight_map.update({spec.name: name for spec in shard})
    total = sum(spec.nbytes for shard in shards for spec in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with DigestingFile(directory / INDEX) as out:
        out.write(canonical_json(index).encode())
        digests[INDEX] = out.digest
    return digests


def rewrite_model(
    source: Path, target: Path, replacements: Mapping[str, Callable[[], Tensor]]
) -> dict[str, str]:
    """Write the weights of ``source`` to ``target`` with some tensors replaced.

    A replacement has the stored dtype and shape, so it takes the same bytes: a shard with one is
    copied with those bytes exchanged, a shard without is hard-linked.

    Args:
        source: Model directory.
        target: Empty directory.
        replacements: Tensor name to what returns the new tensor, called once.

    Returns:
        File name to digest.

    Raises:
        IntegrityError: A replacement has no counterpart, or another dtype or shape.
    """
    weights = TensorDirectory.of_model(source)
    if unknown := sorted(set(replacements) - set(weights.tensors)):
        raise IntegrityError(f"tensor {unknown[0]!r} is not in {source}")
    digests = {}
    for file in weights.files:
        out = target / file.name
        if any(weights.tensors[name].file == file for name in replacements):
            digests[file.name] = _rewrite_file(weights, file, out, replacements)
        else:
            link_or_copy(file, out)
            digests[file.name] = digest_file(out)
    if (source / INDEX).is_file():
        link_or_copy(source / INDEX, target / INDEX)
        digests[INDEX] = digest_file(target / INDEX)
    return digests


def _rewrite_file(
    weights: TensorDirectory,
    file: Path,
    out: Path,
    replacements: Mapping[str, Callable[[], Tensor]],
) -> str:
    infos = sorted((i for i in weights.tensors.values() if i.file == file), key=lambda i: i.begin)
    with file.open("rb") as stream, DigestingFile(out) as sink:
        sink.write(stream.read(infos[0].begin))
        for info in infos:
            if info.name not in replacements:
                sink.write(weights.data(info.name))
                continue
            tensor = replacements[info.name]()
            layout = DTYPE_NAMES.get(tensor.dtype), tuple(tensor.shape)
            if layout != info.layout:
                raise IntegrityError(
                    f"tensor {info.name!r} is {layout} where the model has {info.layout}"
                )
            sink.write(tensor_bytes(tensor))
        return sink.digest
