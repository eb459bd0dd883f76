# SPDX-License-Identifier: Apache-2.0
"""What the demo's report says beside its numbers, decided by the numbers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_ray.demo.recipe import DemoRecipe
    from offsite_ray.results import EvaluationResult

_TRADE = (
    "The trade: every step of distillation brings the emulator nearer to the full model, so the "
    "adapter blocks that were trained in it fit the full model better (a higher share of the "
    "bound), and for the same reason the tuned emulator itself gets better (a smaller privacy "
    "gap). Which plan and how much distillation one hands out is therefore a choice between the "
    "two, and fine-tuning harder, or on text farther from the pretraining, moves both against the "
    "owner."
)


def notes(recipe: DemoRecipe, evaluation: EvaluationResult) -> list[str]:
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
    return known
