# SPDX-License-Identifier: Apache-2.0
"""Writing safetensors in a stream: fresh files, and copies of a model with tensors exchanged."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.bundle.digest import DigestingFile, canonical_json, digest_file
from offsite_ray.bundle.tensors import DTYPE_NAMES, INDEX, TORCH_DTYPES, WEIGHTS, TensorDirectory
from offsite_ray.bundle.windows import windows
from offsite_ray.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from offsite_ray.bundle.digest import Bytes

_MAX_SHARD_BYTES = 5 * 10**9
"""Above which a new file begins, as in transformers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """A tensor that is yet to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Bytes]]
    """Called once, when the tensor's turn comes; gives its bytes in order."""

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, row-major."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def lazy_spec(
    name: str, dtype: str, shape: Sequence[int], make: Callable[[], Tensor]
) -> TensorSpec:
    """Return a tensor as something to write that is made when its turn comes."""
    return TensorSpec(
        name=name, dtype=dtype, shape=tuple(shape), pieces=lambda: [tensor_bytes(make())]
    )


def specs(tensors: Mapping[str, Tensor]) -> list[TensorSpec]:
    """Return tensors in memory as something to write, by name."""
    return [
        lazy_spec(name, DTYPE_NAMES[tensor.dtype], tensor.shape, lambda tensor=tensor: tensor)  # type: ignore[misc]
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
            for piece in spec.pieces():
                out.write(piece)
        return out.digest


def write_model(
    directory: Path, tensors: Iterable[TensorSpec], max_shard_bytes: int = _MAX_SHARD_BYTES
) -> dict[str, str]:
    """Write a model's weights as transformers reads them; return file name to digest."""
    listed = list(tensors)
    digests, weight_map = write_shards(directory, "model", listed, max_shard_bytes)
    if WEIGHTS in digests:
        return digests
    total = sum(spec.nbytes for spec in listed)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with DigestingFile(directory / INDEX) as out:
        out.write(canonical_json(index).encode())
        digests[INDEX] = out.digest
    return digests


def write_shards(
    directory: Path,
    stem: str,
    tensors: Iterable[TensorSpec],
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> tuple[dict[str, str], dict[str, str]]:
    """Write tensors to ``stem.safetensors``, or to several such files, in order.

    Returns:
        File name to digest, and tensor name to file name.
    """
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in tensors:
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    digests, weight_map = {}, {}
    for number, shard in enumerate(shards, start=1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        name = f"{stem}{part}.safetensors"
        digests[name] = write_file(directory / name, shard)
        weight_map.update({spec.name: name for spec in shard})
    return digests, weight_map


def rewrite_model(
    source: Path,
    target: Path,
    replacements: Mapping[str, Callable[[], Tensor]],
    known: Mapping[Path, str] | None = None,
) -> dict[str, str]:
    """Write the weights of ``source`` to ``target`` with some tensors replaced.

    A replacement has the stored dtype and shape, so it takes the same bytes: a shard with one is
    copied with those bytes exchanged, a shard without is hard-linked.

    Args:
        source: Model directory.
        target: Empty directory.
        replacements: Tensor name to what returns the new tensor, called once.
        known: Digests of files of ``source``, where somebody has just read them.

    Returns:
        File name to digest.

    Raises:
        IntegrityError: A replacement has no counterpart, or another dtype or shape.
    """
    weights = TensorDirectory.of_model(source)
    if unknown := sorted(set(replacements) - set(weights.tensors)):
        raise IntegrityError(f"tensor {unknown[0]!r} is not in {source}")
    changed = {weights.tensors[name].file for name in replacements}
    index = [source / INDEX] if (source / INDEX).is_file() else []
    return {
        file.name: _rewrite_file(weights, file, target / file.name, replacements)
        if file in changed
        else _link_or_copy(file, target / file.name, (known or {}).get(file))
        for file in (*weights.files, *index)
    }


def _rewrite_file(
    weights: TensorDirectory,
    file: Path,
    out: Path,
    replacements: Mapping[str, Callable[[], Tensor]],
) -> str:
    infos = weights.of_file(file)
    with file.open("rb") as stream, DigestingFile(out) as sink:
        sink.write(stream.read(infos[0].begin))
        for info in infos:
            if info.name not in replacements:
                for piece in windows(stream, info.begin, info.end):
                    sink.write(piece)
                continue
            tensor = replacements[info.name]()
            layout = DTYPE_NAMES.get(tensor.dtype), tuple(tensor.shape)
            if layout != info.layout:
                raise IntegrityError(
                    f"tensor {info.name!r} is {layout} where the model has {info.layout}"
                )
            sink.write(tensor_bytes(tensor))
        return sink.digest


def _link_or_copy(source: Path, target: Path, digest: str | None) -> str:
    """Hard-link a file, or copy it where the file system cannot; return its digest."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        with source.open("rb") as file, DigestingFile(target) as out:
            for piece in windows(file, 0, os.fstat(file.fileno()).st_size):
                out.write(piece)
            return out.digest
    return digest or digest_file(target)
