# SPDX-License-Identifier: Apache-2.0
"""The demo's report: what it says beside its numbers is decided by the numbers."""

from __future__ import annotations

import json
import os
import platform
from typing import TYPE_CHECKING

from offsite_ray.report import Artefact, write_report

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from offsite_ray.demo.folders import Folders
    from offsite_ray.demo.recipe import DemoRecipe
    from offsite_ray.results import EvaluationResult, TrainingHistory

_TRADE = (
    "The trade: every step of distillation brings the emulator nearer to the full model, so the "
    "adapter blocks that were trained in it fit the full model better (a higher share of the "
    "bound), and for the same reason the tuned emulator itself gets better (a smaller privacy "
    "gap). The split plan, the amount of distillation and how hard one fine-tunes move the two in "
    "opposite directions, and a setting is a choice between them."
)


def write_page(
    folders: Folders,
    recipe: DemoRecipe,
    evaluation: EvaluationResult,
    histories: Mapping[str, TrainingHistory],
    seconds: Mapping[str, float],
) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.png``; return where they are."""
    return write_report(
        folders.root,
        evaluation,
        title="Offsite-tuning, from one machine's point of view",
        histories=histories,
        artefacts=artefacts(folders, histories, seconds),
        notes=notes(evaluation),
        facts=facts(recipe, folders.full_model),
    )


def notes(evaluation: EvaluationResult) -> list[str]:
    """Return the paragraphs of the report: what was found, and the trade behind it."""
    share, privacy = evaluation.bound_share, evaluation.gaps.privacy
    found = []
    if share is not None:
        found.append(
            f"Trained against the emulator, the adapter blocks reach {share:.0%} of the gain in "
            "log-perplexity that the same blocks reach when they are trained inside the full "
            f"model ({'at least' if share >= 0.9 else 'less than'} the 90% that the method "
            "promises)."
        )
    if privacy is not None:
        better = "better" if privacy > 0 else "worse"
        found.append(
            f"The plug-in is {abs(privacy):.3f} nats per token {better} than the tuned emulator, "
            + (
                "so the data owner gains by going back to the owner."
                if privacy > 0
                else "so here the data owner could keep the emulator: a negative privacy gap."
            )
        )
    return [*([" ".join(found)] if found else []), _TRADE]


def facts(recipe: DemoRecipe, foundation: Path) -> dict[str, str]:
    """Return what the numbers depend on."""
    known = {
        "Split plan": recipe.plan,
        "Distillation": f"{recipe.distill_steps} steps of {recipe.distill_batch_size} x "
        f"{recipe.seq_len} tokens, {recipe.distill_workers} Ray Train workers, DeepSpeed ZeRO-3",
        "Public text": "the Python standard library",
        "Private text": f"the documentation of {recipe.private_package}",
        "Fine-tuning": f"{recipe.finetune_steps} steps of {recipe.finetune_batch_size} x "
        f"{recipe.seq_len} tokens at a peak rate of {recipe.finetune_learning_rate:g}",
    }
    record = foundation / "training.json"
    if record.is_file():
        log = json.loads(record.read_text(encoding="utf-8"))
        known["Full model"] = (
            f"{log['parameters'] / 1e6:.1f}M parameters, {log['recipe']['num_blocks']} blocks; "
            f"held-out perplexity {log['held_out']['perplexity']:.1f} on its own kind of text"
        )
    known["Machine"] = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    return known


def artefacts(
    folders: Folders, histories: Mapping[str, TrainingHistory], seconds: Mapping[str, float]
) -> list[Artefact]:
    """Return what each step made: its size on disk, its time, its memory."""
    trained = "fine-tuning (data owner)"
    rows = (
        ("full model", folders.full_model, "", "", "stays with the owner"),
        ("emulator bundle", folders.compressed, "compress", "", "some blocks dropped"),
        (
            "distilled emulator bundle",
            folders.received,
            "distill",
            "distillation",
            "owner to data owner",
        ),
        ("adapter bundle", folders.adapter, "finetune", trained, "data owner to owner"),
        ("plugged-in model", folders.plugged_in, "plug in", "", "what is served"),
        ("bound", folders.bound, "bound", "bound", "only to judge by"),
        (
            "fine-tuned model",
            folders.fine_tuned,
            "full fine-tuning",
            "full fine-tuning",
            "only to judge by",
        ),
    )
    return [
        Artefact(
            name=name,
            path=str(path.relative_to(folders.root)),
            size_bytes=sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
            seconds=seconds.get(step),
            peak_memory_bytes=histories[run].peak_memory_bytes if run else None,
            note=note,
        )
        for name, path, step, run, note in rows
    ]
