# SPDX-License-Identifier: Apache-2.0
"""Reading documents from the pieces of files and datasets."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from offsite_ray.data.parts import DATASET, open_dataset, parts_of
from offsite_ray.errors import DataError, first_line
from offsite_ray.storage import reason

if TYPE_CHECKING:
    from offsite_ray.data.parts import Piece

FORMS: dict[tuple[str, ...], type] = {
    ("prompt", "completion"): str,
    ("messages",): list,
    ("text",): str,
}
"""Columns of each form of document, the most specific first, and the type of their values."""

_COLUMNS = {name for form in FORMS for name in form}
_BUFFER_BYTES = 2**20
_LOOKED_AT = 2**16
"""Bytes behind the place where a text is to be cut in which an end of a line is looked for."""


@dataclass(frozen=True, slots=True)
class Document:
    """A row of a source: the columns of its form, and where it stands."""

    fields: dict[str, Any]
    piece: Piece
    position: int

    @property
    def where(self) -> str:
        """What messages call it: the file and the line."""
        return _FORMATS[self.piece.form].where(self.piece, self.position)


def read_documents(sources: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield documents: ``{"text"}``, ``{"prompt", "completion"}`` or ``{"messages"}``.

    Args:
        sources: As in :func:`offsite_ray.data.parts.parts_of`.

    Raises:
        DataError: A source is missing, empty, or has rows of another form.
    """
    for part in parts_of(sources):
        for piece in part:
            for document in read_piece(piece):
                yield document.fields


def read_piece(piece: Piece) -> Iterator[Document]:
    """Yield the documents of a piece.

    Raises:
        DataError: It cannot be read, or has a row of another form.
    """
    try:
        for position, row in _FORMATS[piece.form].rows(piece):
            yield Document(_form_of(row, piece, position), piece, position)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{piece.name} cannot be read: {reason(error)}") from error
    except (ValueError, RecursionError, pa.ArrowException) as error:
        raise DataError(
            f"{piece.name} cannot be read as {piece.form}: {first_line(error)}"
        ) from error


def _form_of(row: Any, piece: Piece, position: int) -> dict[str, Any]:
    if isinstance(row, Mapping):
        for keys, kind in FORMS.items():
            if all(isinstance(row.get(key), kind) for key in keys):
                if "completion" in keys and not row["completion"].strip():
                    raise DataError(
                        f"{_FORMATS[piece.form].where(piece, position)} has an empty completion, "
                        "of which nothing can be learnt; leave the row out"
                    )
                return {key: row[key] for key in keys}
    raise DataError(
        f'{_FORMATS[piece.form].where(piece, position)} is none of {{"text"}}, '
        '{"prompt", "completion"} (text) and {"messages"} (a list)'
    )


# Text: a document to a piece


def _read_text(piece: Piece) -> Iterator[tuple[int, Any]]:
    with _opened(piece) as file:
        start = _line_end(file, piece.start)
        stop = None if piece.stop is None else _line_end(file, piece.stop)
        file.seek(start)
        text = file.read(None if stop is None else stop - start).decode("utf-8")
    # As files are read in text mode.
    yield 0, {"text": text.replace("\r\n", "\n").replace("\r", "\n")}


def _line_end(file: Any, place: int) -> int:
    """Return where a text is cut: behind the first end of a line, else before a character."""
    if not place:
        return 0
    file.seek(place - 1)
    behind: bytes = file.read(_LOOKED_AT)
    end = behind.find(b"\n")
    if end >= 0:
        return place + end
    begins = (index for index, byte in enumerate(behind[1:]) if byte & 0xC0 != 0x80)
    return place + next(begins, len(behind) - 1)


# JSONL: the lines that begin in a piece


def _read_lines(piece: Piece) -> Iterator[tuple[int, Any]]:
    with _opened(piece) as raw, io.BufferedReader(raw, _BUFFER_BYTES) as lines:
        position = max(0, piece.start - 1)
        lines.seek(position)
        if piece.start:
            position += len(lines.readline())
        while piece.stop is None or position < piece.stop:
            line = lines.readline()
            if not line:
                return
            if line.strip():
                yield position, _parsed(line, piece, position)
            position += len(line)


def _parsed(line: bytes, piece: Piece, position: int) -> Any:
    try:
        return json.loads(line.rstrip().decode("utf-8"))
    except json.JSONDecodeError as error:
        # Its own message counts lines from this one.
        why = f"{error.msg} (column {error.colno})"
    except (ValueError, RecursionError) as error:
        why = first_line(error)
    raise DataError(f"{_line_at(piece, position)} is no JSON: {why}")


def _line_at(piece: Piece, position: int) -> str:
    """Return the number of the line at a byte, for which all before it is read once more."""
    number = 1
    with _opened(piece) as file:
        while position > 0:
            chunk = file.read(min(position, _BUFFER_BYTES))
            number += chunk.count(b"\n")
            position -= len(chunk)
    return f"{piece.name}, line {number}"


# Parquet and datasets: rows


def _read_row_groups(piece: Piece) -> Iterator[tuple[int, Any]]:
    assert piece.place is not None
    with pq.ParquetFile(piece.place.path, filesystem=piece.place.filesystem) as file:
        stop = file.num_row_groups if piece.stop is None else piece.stop
        before = (file.metadata.row_group(index).num_rows for index in range(piece.start))
        position = sum(before)
        columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
        groups = list(range(piece.start, stop))
        for batch in file.iter_batches(row_groups=groups, columns=columns, batch_size=256):
            yield from enumerate(batch.to_pylist(), start=position)
            position += batch.num_rows


def _read_shard(piece: Piece) -> Iterator[tuple[int, Any]]:
    rows = open_dataset(piece.name)
    try:
        yield from enumerate(rows.shard(rows.num_shards, piece.start))
    except Exception as error:
        raise DataError(f"{piece.name} cannot be read: {first_line(error)}") from error


def _row_at(piece: Piece, position: int) -> str:
    return f"{piece.name}, row {position + 1}"


def _row_of_shard(piece: Piece, position: int) -> str:
    whole = piece.start == 0 and piece.stop is None
    return _row_at(piece, position) + ("" if whole else f" of shard {piece.start + 1}")


def _opened(piece: Piece) -> Any:
    assert piece.place is not None
    return piece.place.filesystem.open_input_file(piece.place.path)


class _Format(NamedTuple):
    """How pieces of a form are read."""

    rows: Callable[[Piece], Iterator[tuple[int, Any]]]
    """Yields each row with its position."""
    where: Callable[[Piece, int], str]
    """Says where a position is."""


_FORMATS = {
    ".txt": _Format(_read_text, _row_at),
    ".jsonl": _Format(_read_lines, _line_at),
    ".parquet": _Format(_read_row_groups, _row_at),
    DATASET: _Format(_read_shard, _row_of_shard),
}
"""Form of a piece to how it is read."""
