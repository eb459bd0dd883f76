# SPDX-License-Identifier: Apache-2.0
"""What the verbs return: frozen values with a unit per field. What was not measured is ``None``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SETTINGS = (
    "full_zero_shot",
    "emulator_zero_shot",
    "full_fine_tuned",
    "emulator_fine_tuned",
    "plug_in",
    "bound",
)
"""The five settings of the paper and the bound, in the order of every table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One optimizer step."""

    step: int
    """Steps done, this one included."""
    losses: Mapping[str, float]
    """Parts of the loss by name, before weighting; ``"loss"`` is their weighted sum."""
    learning_rate: float
    """Learning rate of the step."""
    grad_norm: float | None = None
    """Global gradient norm before clipping."""
    tokens_per_s: float | None = None
    """Tokens a second, over all workers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRecord:
    """One evaluation on held-out data during training."""

    step: int
    """Steps done before the evaluation."""
    losses: Mapping[str, float]
    """As in :class:`StepRecord`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingHistory:
    """The loss curves and the cost of a training run."""

    steps: tuple[StepRecord, ...] = ()
    evaluations: tuple[EvalRecord, ...] = ()
    seconds: float | None = None
    """Wall time of the steps, evaluations and checkpoints included, start-up not."""
    num_tokens: int | None = None
    """Tokens that went through a forward pass with gradients."""
    peak_memory_bytes: int | None = None
    """Largest resident memory (or, on a GPU, allocated memory) of a worker."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """Token-weighted language modelling loss on a text."""

    nats_per_token: float
    """Mean negative log-likelihood of a predicted token."""
    nats_per_byte: float
    """The same total over the UTF-8 bytes of the text, so that tokenizers compare."""
    num_tokens: int
    """Predicted tokens."""
    num_bytes: int
    """UTF-8 bytes of the text."""

    @property
    def perplexity(self) -> float:
        """``exp(nats_per_token)``."""
        return math.exp(self.nats_per_token)


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingResult:
    """What was measured of one of the settings."""

    perplexity: Perplexity | None = None
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Task name to metric name to value: ``{"arc_easy": {"acc": 0.31, "acc_stderr": 0.01}}``."""


def to_plain(value: Any) -> Any:
    """Return ``value`` as dicts, lists and scalars that JSON holds; non-finite becomes None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
