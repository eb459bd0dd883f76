# SPDX-License-Identifier: Apache-2.0
"""What the verbs return: frozen values with a unit per field. What was not measured is ``None``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SETTINGS = (
    "full_zero_shot",
    "emulator_zero_shot",
    "full_fine_tuned",
    "emulator_fine_tuned",
    "plug_in",
    "bound",
)
"""The five settings of the paper and the bound, in the order of every table."""


_OWN_BUSINESS = frozenset(
    {
        "model",
        "bundle",
        "data",
        "out",
        "resume",
        "log_dir",
        "report_to",
        "max_failures",
        "teacher_cache",
        "dry_run",
    }
)
"""Settings that say where things lie, not how something is trained."""

MAIN_METRICS = ("acc", "exact_match", "em", "acc_norm", "f1")
"""Scores of a task from 0 to 1 where higher is better, the preferred one first."""


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
    flops_utilisation: float | None = None
    """Share of the devices' peak arithmetic that the model's own takes (MFU), from 0 to 1."""
    peak_memory_bytes: int | None = None
    """Most memory of worker 0 so far: resident, or on a GPU allocated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRecord:
    """One evaluation on held-out data during training."""

    step: int
    """Steps done before the evaluation."""
    losses: Mapping[str, float]
    """As in :class:`StepRecord`."""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    """What is measured beside the loss: ``drift/5`` is the normalised error behind block 5."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStart:
    """What a training run is about to do."""

    total_steps: int
    """Optimizer steps of the whole run."""
    first_step: int
    """Steps that a resumed run has done already."""
    num_train: int
    """Sequences to train on."""
    num_held_out: int
    """Sequences held out for evaluations."""
    earlier: tuple[StepRecord | EvalRecord, ...] = ()
    """What a resumed run has recorded before, in order."""

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RunStart:
        """Return what :func:`to_plain` made plain."""
        earlier = tuple(
            StepRecord(**record) if "learning_rate" in record else EvalRecord(**record)
            for record in plain["earlier"]
        )
        return cls(**{**plain, "earlier": earlier})


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRecord:
    """A checkpoint that is written, whole and durable."""

    step: int
    """Steps done when it was taken."""
    path: str
    """Its directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DevicesRecord:
    """Devices that the workers of a run hold in a Ray cluster from now on."""

    num_gpus: float
    num_cpus: float


Record = RunStart | StepRecord | EvalRecord | CheckpointRecord | DevicesRecord

Report = Callable[[Record], None]
"""Told of the start, each step, evaluation and checkpoint of a run, and of what workers hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingHistory:
    """The loss curves and the cost of a training run."""

    steps: tuple[StepRecord, ...] = ()
    evaluations: tuple[EvalRecord, ...] = ()
    changes: tuple[Mapping[str, Any], ...] = ()
    """Settings that a resumed run changed: ``{"from_step": 40, "learning_rate": 1e-5, ...}``."""
    result_step: int | None = None
    """Steps after which the weights were those that are the result; None: not ended."""
    seconds: float | None = None
    """Wall time of the steps, evaluations and checkpoints included, start-up not."""
    num_tokens: int | None = None
    """Tokens that went through a forward pass with gradients."""
    peak_memory_bytes: int | None = None
    """Largest resident memory (or, on a GPU, allocated memory) of a worker."""

    @property
    def result_evaluation(self) -> EvalRecord | None:
        """The evaluation of the weights that are the result."""
        found = [record for record in self.evaluations if record.step == self.result_step]
        return found[-1] if found else None

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> TrainingHistory:
        """Return what :func:`to_plain` made plain."""
        steps = tuple(StepRecord(**record) for record in plain["steps"])
        evaluations = tuple(EvalRecord(**record) for record in plain["evaluations"])
        changes = tuple(plain["changes"])
        own = {"steps": steps, "evaluations": evaluations, "changes": changes}
        return cls(**{**plain, **own})


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
        """``exp(nats_per_token)``; infinite where that is beyond a float."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingResult:
    """What was measured of one of the settings."""

    perplexity: Perplexity | None = None
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Task name to metric name to value: ``{"arc_easy": {"acc": 0.31, "acc_stderr": 0.01}}``."""


GapMetric = Literal["nats_per_token", "task_score"]
"""What gaps are counted in: log-perplexity where text was given, else the tasks' mean score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gaps:
    """What offsite-tuning costs and what it protects; higher scores or fewer nats are better."""

    utility: float | None = None
    """By how much full fine-tuned is better than the plug-in."""
    privacy: float | None = None
    """By how much the plug-in is better than the tuned emulator; negative where it is worse."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """The five settings, the bound and the gaps between them."""

    settings: Mapping[str, SettingResult | None]
    """One of :data:`SETTINGS` to what was measured; None where its artefact was not given."""
    gap_metric: GapMetric
    """Unit of ``gaps`` and ``bound_share``."""
    gaps: Gaps
    """In nats per token (positive: fewer nats) or as a difference of mean scores."""
    task_gaps: Mapping[str, Gaps] = field(default_factory=dict)
    """Task name to the gaps in its main metric."""
    bound_share: float | None = None
    """Share of the bound's gain over full zero-shot that the plug-in reaches."""
    fine_tuned_share: float | None = None
    """Share of full fine-tuning's gain over full zero-shot that the plug-in reaches."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The configuration as it was given, and the context length that was used."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package name to version."""
    date: str | None = None
    """When the evaluation ended, ISO 8601, UTC."""
    seconds: float | None = None
    """Wall time of the whole evaluation."""

    def to_json(self) -> dict[str, Any]:
        """Return what ``evaluate --json`` prints: each setting with its ``perplexity`` or null."""
        plain: dict[str, Any] = to_plain(self)
        plain["settings"] = {
            name: None if setting is None else _setting_json(setting)
            for name, setting in ((name, self.settings.get(name)) for name in SETTINGS)
        }
        return plain


def _setting_json(setting: SettingResult) -> dict[str, Any]:
    measured = setting.perplexity
    text = {} if measured is None else to_plain(measured)
    perplexity = None if measured is None else to_plain(measured.perplexity)
    return {"perplexity": perplexity, **text, "tasks": to_plain(setting.tasks)}


def main_metric(metrics: Mapping[str, float]) -> str | None:
    """Return the name of the metric that a task is told by: accuracy where it has one."""
    named = {name.split(",")[0]: name for name in reversed(list(metrics))}
    return next((named[base] for base in MAIN_METRICS if base in named), None)


def recipe_of(config: Any, **known: Any) -> dict[str, Any]:
    """Return how something was trained, for the manifest that goes to the other party.

    Where things lie on the own machine is left out: names of private files among it.

    Args:
        config: The configuration of a training verb.
        **known: What stands for it instead, e.g. the digest of public data.
    """
    told = {key: value for key, value in to_plain(config).items() if key not in _OWN_BUSINESS}
    return {**told, **to_plain(known)}


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


def bytes_text(size: int) -> str:
    """Return a number of bytes as people read it, e.g. ``1.5 GiB``."""
    shown, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if shown < 1024:
            break
        shown, unit = shown / 1024, larger
    return f"{size} bytes" if unit == "bytes" else f"{shown:.1f} {unit}"
