# SPDX-License-Identifier: Apache-2.0
"""An lm-eval task of one's own, with its questions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pathlib import Path

QUESTIONS: list[dict[str, Any]] = [
    {"question": f"What is {a} and {b}", "choices": [f"{a + b}", f"{a * b} x"], "answer": a % 2}
    for a in range(5)
    for b in range(3)
]
"""Of two choices each, in the simple form of ``--task-data``."""

GENERATING: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "doc_to_choice": None,
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match"}],
}
"""What makes of the task one that generates its answers."""


def write_questions(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def own_task(folder: Path, name: str = "sums", **changes: Any) -> Path:
    """Write a multiple-choice task of one's own with its documents beside it."""
    file = write_questions(folder / "sums.jsonl", QUESTIONS)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": changes.pop("file", file.name)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task))
    return path
