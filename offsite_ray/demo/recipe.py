# SPDX-License-Identifier: Apache-2.0
"""The numbers of the demo, in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRecipe:
    """A setting in which the plug-in nears its bound and the emulator stays behind it.

    How it was chosen, with 30 steps of fine-tuning (share of the bound's gain in log-perplexity,
    privacy gap in nats per token):

    ======  ============================  ============================  =====  ===========
    plan    distillation, steps and rate  peak rate of fine-tuning      share  privacy gap
    ======  ============================  ============================  =====  ===========
    2-4-2   300 at 1e-3                   3e-4                          77%    0.110
    3-4-3   150 at 1e-3                   6e-4                          89%    0.074
    3-4-3   250 at 2e-3                   6e-4                          91%    0.032
    4-3-4   150 at 1e-3                   6e-4                          89%    0.067
    4-3-4   250 at 2e-3                   3e-4                          90%    0.048
    4-3-4   250 at 2e-3                   6e-4                          92%    0.032
    ======  ============================  ============================  =====  ===========
    """

    plan: str = "4-3-4"
    """Split plan: the emulator keeps three of the eight middle blocks."""
    seq_len: int = 256
    """Tokens in a sequence, for training and evaluation."""
    distill_steps: int = 220
    """Optimizer steps of distillation."""
    distill_batch_size: int = 16
    """Sequences in one of them."""
    distill_learning_rate: float = 2e-3
    """Peak learning rate of distillation."""
    distill_workers: int = 2
    """Ray Train workers of distillation."""
    private_package: str = "networkx"
    """Installed package whose documentation is the data owner's text."""
    finetune_steps: int = 30
    """Optimizer steps of each fine-tuning."""
    finetune_batch_size: int = 8
    """Sequences in one of them."""
    finetune_learning_rate: float = 6e-4
    """Peak learning rate of each fine-tuning."""
    held_out_characters: int = 120_000
    """Characters of held-out private text that perplexities are measured on."""
    task_questions: int = 100
    """Questions of the multiple-choice task."""

    def scaled(self, scale: float) -> DemoRecipe:
        """Return the recipe with ``scale`` times the work, at least two steps of each training."""
        return replace(
            self,
            distill_steps=max(2, round(self.distill_steps * scale)),
            finetune_steps=max(2, round(self.finetune_steps * scale)),
            held_out_characters=max(4_000, round(self.held_out_characters * scale)),
            task_questions=max(8, round(self.task_questions * scale)),
        )
