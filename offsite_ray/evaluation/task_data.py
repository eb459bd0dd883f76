# SPDX-License-Identifier: Apache-2.0
"""Documents of an lm-eval task from a local file, in the format of the task's own dataset.

``--task-data TASK=FILE`` names the documents to evaluate on; ``TASK:fewshot=FILE`` those to draw
the examples of a prompt from (by default the same file, without the document that is asked about).

A file is ``.jsonl``, ``.json`` (a list of objects) or ``.parquet``. Beside the columns of the
task's own dataset, multiple-choice tasks of :data:`SIMPLE_CHOICES` take the simple form
``{"question": str, "choices": [str, ...], "answer": index}``.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from offsite_ray.errors import ConfigError, DataError, StorageError
from offsite_ray.uris import refuse_uri

Row = Mapping[str, Any]

FEWSHOT = "fewshot"
"""What ``TASK:fewshot=FILE`` names: the documents that examples are drawn from."""


def parse_task_data(entries: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Return task name to ``{"test": file, "fewshot": file}`` from ``TASK[:fewshot]=FILE`` entries.

    Raises:
        ConfigError: An entry is not of that form, or names a file twice.
        StorageError: A file is missing.
    """
    files: dict[str, dict[str, Path]] = {}
    for entry in entries:
        key, equals, file = entry.partition("=")
        task, _, role = key.strip().partition(":")
        if not (task and equals and file) or role not in ("", FEWSHOT):
            raise ConfigError(
                f"--task-data {entry!r} is not of the form TASK=FILE or TASK:{FEWSHOT}=FILE"
            )
        refuse_uri("--task-data", file)
        path = Path(file).expanduser().absolute()
        if not path.is_file():
            raise StorageError(f"--task-data {entry!r}: there is no file {path}")
        if files.setdefault(task, {}).setdefault(role or "test", path) != path:
            raise ConfigError(f"--task-data names two files for {key!r}; give one")
    return files


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a .jsonl, .json or .parquet file, all of them objects.

    Raises:
        DataError: The file is of another kind, malformed or empty.
    """
    readers: dict[str, Callable[[Path], list[Any]]] = {
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise DataError(f"{path} is none of {', '.join(readers)}; convert it to one of them")
    rows = readers[path.suffix](path)
    if not rows:
        raise DataError(f"{path} holds no row; give a file with at least one")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {index + 1} is {type(row).__name__}, not an object")
    return rows


def task_rows(task: str, path: Path, columns: Sequence[str]) -> list[Row]:
    """Return the rows of ``path`` in the format of the task's own dataset.

    Args:
        task: Name of the task; those of :data:`SIMPLE_CHOICES` also take the simple form.
        path: The local file.
        columns: Columns that the task's templates read.

    Raises:
        DataError: A row lacks one of ``columns`` and is not of the simple form either.
    """
    rows = read_rows(path)
    convert = SIMPLE_CHOICES.get(task)
    if convert is not None and _is_simple(rows[0]):
        return [convert(*_simple_fields(path, index, row)) for index, row in enumerate(rows)]
    for index, row in enumerate(rows):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            simple = " (or question, choices as a list of texts, answer as its index)"
            raise DataError(
                f"{path}, row {index + 1} has no {', '.join(missing)}: task {task!r} reads "
                f"{', '.join(columns)}{simple if convert else ''}; the row has {', '.join(row)}"
            )
    return rows


def _arc(question: str, choices: Sequence[str], answer: int) -> Row:
    labels = list(string.ascii_uppercase[: len(choices)])
    return {
        "question": question,
        "choices": {"text": list(choices), "label": labels},
        "answerKey": labels[answer],
    }


def _openbookqa(question: str, choices: Sequence[str], answer: int) -> Row:
    row = dict(_arc(question, choices, answer))
    return {"question_stem": row.pop("question"), **row}


def _piqa(question: str, choices: Sequence[str], answer: int) -> Row:
    first, second = choices
    return {"goal": question, "sol1": first, "sol2": second, "label": answer}


SIMPLE_CHOICES: dict[str, Callable[[str, Sequence[str], int], Row]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
}
"""Stock tasks that also take the simple form, and how a simple row becomes one of theirs."""


def _is_simple(row: Row) -> bool:
    return {"question", "choices", "answer"} <= set(row) and isinstance(row["choices"], list)


def _simple_fields(path: Path, index: int, row: Row) -> tuple[str, Sequence[str], int]:
    question, choices, answer = (row.get(key) for key in ("question", "choices", "answer"))
    if (
        not isinstance(question, str)
        or not isinstance(choices, list)
        or not 2 <= len(choices) <= len(string.ascii_uppercase)
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise DataError(
            f"{path}, row {index + 1}: question must be a text and choices a list of at least two"
        )
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(
            f"{path}, row {index + 1}: answer={answer!r} must be an index of the "
            f"{len(choices)} choices, from 0"
        )
    return question, choices, answer


def _read_json_lines(path: Path) -> list[Any]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise DataError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


def _read_json(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {type(rows).__name__}, not a list of objects")
    return rows


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    rows: list[Any] = table.to_pylist()
    return rows
