# SPDX-License-Identifier: Apache-2.0
"""Small texts and a tokenizer for tests of what is made of texts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from offsite_ray.data import BlockFiles
from offsite_ray.data.manifest import read_data_manifest
from offsite_ray.data.packing import COLUMNS
from tests.tiny_models import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

CHAT = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "so"},
]
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "one"}, {"text": "two"}],
    "completion": [{"prompt": "ask ", "completion": "told"}, {"prompt": "", "completion": "b"}],
    "messages": [{"messages": TALK}],
    "more columns": [{"prompt": "a", "completion": "b"}],
}
MORE_COLUMNS = {"text": "not this", "id": 3}


def save_tokenizer(directory: Path) -> Path:
    """Write a tokenizer of one token to a character, with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(directory)
    return directory


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSONL or Parquet, by the suffix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return file


def columns_of(out: Path) -> dict[str, list[list[int]]]:
    """Return the blocks of a prepared directory by column."""
    manifest = read_data_manifest(out)
    blocks = BlockFiles(out, manifest.files)
    rows = [blocks[index] for index in range(manifest.num_blocks)]
    return {name: [row[name].tolist() for row in rows] for name in COLUMNS}
