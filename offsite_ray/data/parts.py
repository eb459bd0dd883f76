# SPDX-License-Identifier: Apache-2.0
"""Sources cut into parts that can be read on their own, by what the sources are and nothing else.

A part is as good as independent of the others, so that any number of workers makes the same blocks
out of the same sources.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from offsite_ray.errors import DataError, first_line
from offsite_ray.storage import place_of, reason
from offsite_ray.uris import is_uri

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any

    from offsite_ray.storage import Place

DATASET = "dataset"
"""The form of a piece that is no file."""

_PART_BYTES = 4 * 2**20
"""Least size of a part: two seconds of a core, beside which it costs nothing to hand it out."""
_MOST_PARTS = 4096
"""Of a larger corpus the parts grow: each costs the driver some kilobytes."""
_DOCUMENT_BYTES = 4 * 2**20
"""Size from which a text is cut, at ends of lines, into documents; a tokenizer takes them whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A range of a source, read in one go."""

    name: str
    """What messages call the source."""
    form: str
    """A suffix, or :data:`DATASET`."""
    place: Place | None = None
    """The file; a dataset has none."""
    start: int = 0
    """First byte, row group or shard."""
    stop: int | None = None
    """First byte, row group or shard of the next piece; None: there is none."""
    num_bytes: int = 0
    """About how much it is."""


Part = tuple[Piece, ...]


def parts_of(sources: Sequence[str]) -> tuple[Part, ...]:
    """Return sources as parts, in their order.

    Args:
        sources: ``.txt``, ``.jsonl`` and ``.parquet`` files, directories of them (paths or URIs),
            or the name of a dataset (``name`` or ``name:config``; its ``train`` split).

    Raises:
        DataError: A source is missing, empty, or of another form.
    """
    found = [found for source in sources for found in _found(source)]
    total = sum(size for _, size in found)
    part_bytes = max(_PART_BYTES, total // _MOST_PARTS)
    pieces = (
        piece
        for source, size in found
        for piece in (
            _shards(source) if isinstance(source, str) else _cut(source, size, part_bytes)
        )
    )
    return tuple(_gathered(pieces, part_bytes))


def _found(source: str) -> Iterator[tuple[Place | str, int]]:
    """Yield the files of a source with their sizes; of a dataset its name."""
    place = place_of(source)
    try:
        if place.is_directory():
            files = [(file, size) for file, size in place.files() if _suffix(file) in _CUTS]
            if not files:
                raise DataError(f"{place.name} holds no file of {', '.join(_CUTS)}")
            yield from files
        elif place.is_file():
            if _suffix(place) not in _CUTS:
                raise DataError(f"{place.name} is none of {', '.join(_CUTS)}")
            yield place, place.size()
        elif _suffix(place) in _CUTS or os.path.isabs(source) or is_uri(source):
            raise DataError(f"{place.name} does not exist; give a file, a directory or a dataset")
        else:
            yield source, 0
    except OSError as error:
        raise DataError(f"{place.name} cannot be read: {reason(error)}") from error


def _suffix(place: Place) -> str:
    return os.path.splitext(place.path)[1]


def _cut(file: Place, size: int, part_bytes: int) -> Iterator[Piece]:
    form = _suffix(file)
    try:
        for start, stop, num_bytes in _CUTS[form](file, size, part_bytes):
            yield Piece(
                name=file.name,
                form=form,
                place=file,
                start=start,
                stop=stop,
                num_bytes=num_bytes,
            )
    except (ValueError, pa.ArrowException) as error:
        raise DataError(f"{file.name} cannot be read as {form}: {first_line(error)}") from error
    except OSError as error:
        raise DataError(f"{file.name} cannot be read: {reason(error)}") from error


_Range = tuple[int, "int | None", int]


def _cut_text(_: Place, size: int, __: int) -> Iterator[_Range]:
    return _cut_bytes(size, _DOCUMENT_BYTES)


def _cut_lines(_: Place, size: int, part_bytes: int) -> Iterator[_Range]:
    return _cut_bytes(size, part_bytes)


def _cut_bytes(size: int, step: int) -> Iterator[_Range]:
    for start in range(0, max(size, 1), step):
        stop = start + step
        yield start, stop if stop < size else None, min(stop, size) - start


def _cut_row_groups(file: Place, size: int, part_bytes: int) -> Iterator[_Range]:
    if size <= part_bytes:
        yield 0, None, size
        return
    with pq.ParquetFile(file.path, filesystem=file.filesystem) as opened:
        groups = opened.metadata
        for index in range(groups.num_row_groups):
            yield index, index + 1, groups.row_group(index).total_byte_size


_CUTS: dict[str, Callable[[Place, int, int], Iterator[_Range]]] = {
    ".txt": _cut_text,
    ".jsonl": _cut_lines,
    ".parquet": _cut_row_groups,
}
"""Suffix to what yields the ranges that a file is read in: start, stop, bytes."""


def _shards(name: str) -> Iterator[Piece]:
    num_shards = open_dataset(name).num_shards
    for index in range(num_shards):
        stop = index + 1 if index + 1 < num_shards else None
        # How large a shard is, nobody knows: each is a part.
        yield Piece(name=name, form=DATASET, start=index, stop=stop, num_bytes=2**62)


def open_dataset(name: str) -> Any:
    """Return a dataset by its name, to be streamed.

    Raises:
        DataError: There is none of that name.
    """
    import datasets

    path, *config = name.split(":")
    try:
        where = os.path.abspath(path) if os.path.isdir(path) else path
        return datasets.load_dataset(where, *config, split="train", streaming=True)
    except Exception as error:
        raise DataError(f"{name} is no file, and no dataset either: {first_line(error)}") from error


def _gathered(pieces: Iterable[Piece], part_bytes: int) -> Iterator[Part]:
    """Yield parts of about the same size: small files together, large ones in pieces."""
    part: list[Piece] = []
    num_bytes = 0
    for piece in pieces:
        if part and num_bytes + piece.num_bytes > part_bytes:
            yield tuple(part)
            part, num_bytes = [], 0
        part.append(piece)
        num_bytes += piece.num_bytes
    if part:
        yield tuple(part)
