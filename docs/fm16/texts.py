# SPDX-License-Identifier: Apache-2.0
"""Write the texts of the sweeps in this folder: what is trained on, and what is measured on.

python docs/fm16/texts.py ../shared/data runs/fm16
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def main(data: Path, out: Path) -> None:
    """Write the public text, and two pieces of each of two private ones."""
    out.mkdir(parents=True, exist_ok=True)
    prose = (data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    pieces = [prose, *_facts(data), "".join(_sums(data))[:500_000]]
    (out / "public.txt").write_text("".join(pieces), encoding="utf-8")
    plays = (data / "shakespeare" / "input.txt").read_text(encoding="utf-8")
    (out / "shakespeare.txt").write_text(plays[:-60_000], encoding="utf-8")
    (out / "shakespeare-held-out.txt").write_text(plays[-60_000:], encoding="utf-8")
    for split, name in (("train", "arc_easy.txt"), ("test", "arc_easy-held-out.txt")):
        rows = list(_rows(data / "arc_easy" / f"{split}.jsonl"))
        asked = [
            f"Question: {row['question']}\nAnswer: {row['choices'][row['answer']]}\n\n"
            for row in (rows if split == "train" else rows[:400])
        ]
        (out / name).write_text("".join(asked), encoding="utf-8")


def _facts(data: Path) -> Iterator[str]:
    for row in _rows(data / "openbookqa" / "train.jsonl"):
        yield f"{row['question']} {row['choices'][row['answer']]}\n"
    for row in _rows(data / "piqa" / "valid.jsonl"):
        yield f"{row['goal']} {row['sol1']}\n"


def _sums(data: Path) -> Iterator[str]:
    for row in _rows(data / "gsm8k" / "train.jsonl"):
        yield f"{row['question']}\n{row['answer']}\n\n"


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, file.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
