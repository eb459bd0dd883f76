# SPDX-License-Identifier: Apache-2.0
"""Who has what in the demo: a folder for each party, with the texts that it starts from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offsite_ray.demo.task import write_task
from offsite_ray.demo.texts import Document, held_out, package_documentation, standard_library

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_ray.demo.recipe import DemoRecipe

_HELD_OUT_ONE_IN = 6


@dataclass(frozen=True, slots=True)
class Folders:
    """Where each thing lies. The data owner's folder never holds anything of the full model."""

    root: Path

    @property
    def owner(self) -> Path:
        """The model owner's: full model, public text, everything made of the full model."""
        return self.root / "owner"

    @property
    def data_owner(self) -> Path:
        """The data owner's: the emulator bundle, private text, the adapter bundle."""
        return self.root / "data-owner"

    @property
    def evaluation(self) -> Path:
        """Nobody's in real life: held-out private text and both parties' models together."""
        return self.root / "evaluation"

    @property
    def full_model(self) -> Path:
        """The full model."""
        return self.owner / "full-model"

    @property
    def compressed(self) -> Path:
        """The emulator bundle before distillation."""
        return self.owner / "bundle"

    @property
    def distilled(self) -> Path:
        """The emulator bundle that the owner hands out."""
        return self.owner / "distilled-bundle"

    @property
    def plugged_in(self) -> Path:
        """The full model with the data owner's adapter blocks."""
        return self.owner / "plugged-in"

    @property
    def received(self) -> Path:
        """The data owner's copy of the emulator bundle."""
        return self.data_owner / "bundle"

    @property
    def private(self) -> Path:
        """The data owner's text."""
        return self.data_owner / "private.jsonl"

    @property
    def adapter(self) -> Path:
        """The adapter bundle, made by the data owner."""
        return self.data_owner / "adapter"

    @property
    def bound(self) -> Path:
        """Adapter blocks trained inside the full model."""
        return self.evaluation / "bound"

    @property
    def fine_tuned(self) -> Path:
        """The full model, fine-tuned."""
        return self.evaluation / "fine-tuned"

    @property
    def public(self) -> Path:
        """The owner's text for distillation."""
        return self.owner / "public.jsonl"

    @property
    def held_out(self) -> Path:
        """Text of the data owner's kind that nobody trains on."""
        return self.evaluation / "held-out.jsonl"


def write_texts(folders: Folders, recipe: DemoRecipe) -> None:
    """Write public text for the owner, private text for the data owner, held-out for the test."""
    _write_jsonl(folders.public, standard_library())
    private, test = held_out(package_documentation(recipe.private_package), _HELD_OUT_ONE_IN)
    _write_jsonl(folders.private, private)
    _write_jsonl(folders.held_out, _first_characters(test, recipe.held_out_characters))
    write_task(folders.evaluation, test, recipe.task_questions, seed=0)


def _first_characters(documents: list[Document], budget: int) -> list[Document]:
    """Return the beginning of each document, all of equal share of ``budget`` characters."""
    share = max(200, budget // len(documents))
    return [Document(name=d.name, text=d.text[:share]) for d in documents]


def _write_jsonl(path: Path, documents: list[Document]) -> None:
    lines = "".join(json.dumps({"text": d.text}) + "\n" for d in documents)
    path.write_text(lines, encoding="utf-8")
