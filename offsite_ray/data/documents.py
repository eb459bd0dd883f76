# SPDX-License-Identifier: Apache-2.0
"""Reading documents from files, directories and datasets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from offsite_ray.errors import DataError, first_line

FORMS: dict[tuple[str, ...], type] = {
    ("prompt", "completion"): str,
    ("messages",): list,
    ("text",): str,
}
"""Columns of each form of document, the most specific first, and the type of their values."""


def read_documents(sources: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield documents: ``{"text"}``, ``{"prompt", "completion"}`` or ``{"messages"}``.

    Args:
        sources: ``.txt`` (a document each), ``.jsonl`` and ``.parquet`` files, directories of them,
            or the name of a dataset (``name`` or ``name:config``; its ``train`` split).

    Raises:
        DataError: A source is missing, empty, or has rows of another form.
    """
    for source in sources:
        path = Path(source)
        # Not Path's own questions, to which a name that is too long is an OSError and not a no.
        if os.path.isdir(path):
            files = sorted(p for p in path.rglob("*") if p.suffix in READERS and p.is_file())
            if not files:
                raise DataError(f"{source} holds no file of {', '.join(READERS)}")
            for file in files:
                yield from _read_file(file)
        elif os.path.exists(path):
            yield from _read_file(path)
        elif path.suffix in READERS or path.is_absolute():
            raise DataError(f"{source} does not exist; give a file, a directory or a dataset")
        else:
            yield from _read_dataset(source)


def _read_file(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix not in READERS:
        raise DataError(f"{file} is none of {', '.join(READERS)}")
    try:
        for number, row in enumerate(READERS[file.suffix](file), start=1):
            yield _checked(row, f"{file}, row {number}")
    except (ValueError, RecursionError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read as {file.suffix}: {error}") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error


def _read_text(file: Path) -> Iterator[Any]:
    yield {"text": file.read_text(encoding="utf-8")}


def _read_jsonl(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:  # its own message counts lines from this one
                    raise ValueError(f"line {number} is no JSON: {error}") from error


def _read_parquet(file: Path) -> Iterator[Any]:
    for batch in pq.ParquetFile(file).iter_batches():
        yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
"""File suffix to what yields its rows."""


def _read_dataset(name: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(*name.split(":"), split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _checked(row, f"{name}, row {number}")
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name} is no file, and no dataset either: {first_line(error)}") from error


def _checked(row: Any, where: str) -> dict[str, Any]:
    if isinstance(row, Mapping):
        for keys, form in FORMS.items():
            if all(isinstance(row.get(key), form) for key in keys):
                return dict(row)
    raise DataError(
        f'{where} is none of {{"text"}}, {{"prompt", "completion"}} (text) and {{"messages"}} '
        "(a list)"
    )
