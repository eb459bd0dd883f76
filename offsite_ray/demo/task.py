# SPDX-License-Identifier: Apache-2.0
"""A multiple-choice task for lm-eval, made of held-out text: which passage goes on here?"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_ray.demo.texts import Document

TASK_NAME = "continuation"

_CONTEXT_CHARACTERS = 240
_CHOICE_CHARACTERS = 80
_NUM_CHOICES = 4

_YAML = """\
task: continuation
dataset_path: json
dataset_kwargs:
  data_files:
    test: continuation.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def write_task(directory: Path, documents: list[Document], num_questions: int, seed: int) -> Path:
    """Write the task's YAML and its questions; return the YAML.

    A question is a passage, the choices are the text that follows it and three that follow other
    passages of the same kind of text.

    Raises:
        DataError: The documents hold too few passages.
    """
    passages = list(_passages(documents))
    if len(passages) < _NUM_CHOICES:
        raise DataError(f"{len(passages)} passages make no question; give more held-out text")
    draw = random.Random(seed)
    draw.shuffle(passages)
    questions = [_question(passages, index, draw) for index in range(num_questions)]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (directory / f"{TASK_NAME}.jsonl").write_text(lines, encoding="utf-8")
    yaml = directory / f"{TASK_NAME}.yaml"
    yaml.write_text(_YAML, encoding="utf-8")
    return yaml


def _passages(documents: list[Document]) -> list[tuple[str, str]]:
    """Return passages with what follows them, cut at spaces."""
    found = []
    length = _CONTEXT_CHARACTERS + _CHOICE_CHARACTERS
    for document in documents:
        text = document.text
        for start in range(0, len(text) - length, length):
            cut = text.rfind(" ", start, start + _CONTEXT_CHARACTERS)
            if cut > start:
                found.append((text[start:cut], text[cut : cut + _CHOICE_CHARACTERS]))
    return found


def _question(passages: list[tuple[str, str]], index: int, draw: random.Random) -> dict[str, Any]:
    own = index % len(passages)
    others = draw.sample([i for i in range(len(passages)) if i != own], _NUM_CHOICES - 1)
    choices = [passages[i][1] for i in (own, *others)]
    order = draw.sample(range(_NUM_CHOICES), _NUM_CHOICES)
    return {
        "question": passages[own][0],
        "choices": [choices[i] for i in order],
        "answer": order.index(0),
    }
