# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found, for people: a page, a picture and a table for the terminal."""

from __future__ import annotations

import contextlib
import math
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import StorageError
from offsite_ray.report_plots import Bar, Panel, by_history, panel_svg, summary_png
from offsite_ray.results import (
    SETTINGS,
    EvaluationResult,
    Gaps,
    SettingResult,
    TrainingHistory,
    bytes_text,
    main_metric,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.table import Table

NOT_MEASURED = "\N{EN DASH}"
"""What stands where nothing was measured."""

_LABELS = {
    "full_zero_shot": ("Full zero-shot", "the full model as it is"),
    "emulator_zero_shot": ("Emulator zero-shot", "the emulator model as it is"),
    "full_fine_tuned": ("Full fine-tuned", "every block of the full model trained"),
    "emulator_fine_tuned": ("Emulator fine-tuned", "what the data owner has alone"),
    "plug_in": ("Plug-in", "trained adapter blocks in the full model"),
    "bound": ("Bound", "adapter blocks trained inside the full model"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Artefact:
    """One row of "sizes and times"; what was not measured is None."""

    name: str
    path: str = ""
    size_bytes: int | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A task's main metric."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingRow:
    """One setting as every table shows it; what was not measured is None."""

    name: str
    """One of :data:`offsite_ray.results.SETTINGS`."""
    label: str
    meaning: str
    perplexity: float | None = None
    nats_per_token: float | None = None
    nats_per_byte: float | None = None
    scores: Mapping[str, Score | None] = field(default_factory=dict)
    """Every task of the evaluation to its main score."""

    @property
    def bits_per_byte(self) -> float | None:
        """``nats_per_byte`` in bits."""
        return None if self.nats_per_byte is None else self.nats_per_byte / math.log(2)

    @property
    def mean_score(self) -> float | None:
        """Mean of the main scores; None where one is missing."""
        values = [score.value for score in self.scores.values() if score is not None]
        whole = len(values) == len(self.scores) > 0
        return sum(values) / len(values) if whole else None


def settings_rows(evaluation: EvaluationResult) -> list[SettingRow]:
    """Return the five settings and the bound in the order of every table, all of them always."""
    tasks = task_metrics(evaluation)
    return [_row(name, evaluation.settings.get(name), tasks) for name in SETTINGS]


def task_metrics(evaluation: EvaluationResult) -> dict[str, str]:
    """Return every task that some setting was measured on, with the name of its main metric."""
    found: dict[str, str] = {}
    for setting in filter(None, evaluation.settings.values()):
        for task, metrics in setting.tasks.items():
            found[task] = found.get(task) or main_metric(metrics) or ""
    return found


def result_sentence(evaluation: EvaluationResult) -> str:
    """Return the result in one sentence; a negative gap is called negative."""
    nats = evaluation.gap_metric == "nats_per_token"
    unit = " nats per token" if nats else " in the mean task score"
    gaps = evaluation.gaps
    clauses = [
        _share_clause(evaluation),
        _gap_clause("utility", gaps.utility, unit, "the plug-in is better than full fine-tuning"),
        _gap_clause("privacy", gaps.privacy, unit, "the plug-in is worse than the tuned emulator"),
    ]
    said = "; ".join(filter(None, clauses))
    said = said or "too few settings were measured to compare the plug-in with anything"
    return f"{said[0].upper()}{said[1:]}."


def terminal_table(evaluation: EvaluationResult) -> Table:
    """Return the settings as a ``rich`` table, with the result and the gaps below."""
    from rich.table import Table
    from rich.text import Text

    tasks = task_metrics(evaluation)
    table = Table(caption=Text(result_sentence(evaluation)), caption_justify="left")
    table.add_column("setting", no_wrap=True)
    for heading in ("perplexity", "nats/token", "bits/byte"):
        table.add_column(heading, justify="right")
    for task, metric in tasks.items():
        table.add_column(Text(f"{task}\n{metric}"), justify="right")
    for row in settings_rows(evaluation):
        table.add_row(
            row.label,
            _perplexity(row.perplexity),
            _number(row.nats_per_token),
            _number(row.bits_per_byte),
            *(_score(row.scores[task]) for task in tasks),
            style="bold" if row.name == "plug_in" else None,
        )
    return table


def write_report(
    out: Path,
    evaluation: EvaluationResult,
    *,
    title: str,
    histories: Mapping[str, TrainingHistory] = {},
    artefacts: Sequence[Artefact] = (),
    notes: Sequence[str] = (),
    facts: Mapping[str, str] = {},
) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.png`` and return their paths.

    The page stands alone: it has its style and its plots inside and asks the network for nothing.

    Args:
        out: Folder to write into; made where it is missing. Older reports in it are replaced.
        evaluation: What was measured.
        title: Heading of the page and of the picture.
        histories: Name of a training run to its loss curves.
        artefacts: Rows of the table of sizes and times.
        notes: Paragraphs below the chart, as plain text.
        facts: Name to value: the plan, the machine. Date, wall time and versions of the evaluation
            are added where they are not among them.

    Raises:
        StorageError: ``out`` cannot be written; neither file is left half written.
    """
    curves = by_history(histories)
    panels = [panel for _, _, found in curves for panel in found]
    bars_title, bars = _bars(evaluation)
    sentence = result_sentence(evaluation)
    page = _template().render(
        title=title,
        sentence=sentence,
        rows=settings_rows(evaluation),
        tasks=task_metrics(evaluation),
        gaps=_gaps(evaluation),
        bars=bars,
        bars_title=bars_title,
        notes=notes,
        curves=[(name, _cost(run, found[0].window), _drawn(found)) for name, run, found in curves],
        artefacts=artefacts,
        has_remarks=any(artefact.note for artefact in artefacts),
        facts=_facts(evaluation, facts),
    )
    picture = summary_png(title, sentence, bars, bars_title, panels)
    html, png = out / "report.html", out / "report.png"
    _write_all({html: page.encode(), png: picture})
    return html, png


def _row(name: str, setting: SettingResult | None, tasks: Mapping[str, str]) -> SettingRow:
    label, meaning = _LABELS[name]
    text = None if setting is None else setting.perplexity
    measured = {} if setting is None else setting.tasks
    return SettingRow(
        name=name,
        label=label,
        meaning=meaning,
        perplexity=None if text is None else text.perplexity,
        nats_per_token=None if text is None else text.nats_per_token,
        nats_per_byte=None if text is None else text.nats_per_byte,
        scores={task: _main_score(measured.get(task, {}), main) for task, main in tasks.items()},
    )


def _main_score(metrics: Mapping[str, float], main: str) -> Score | None:
    if main not in metrics:
        return None
    base, comma, kind = main.partition(",")
    return Score(value=metrics[main], stderr=metrics.get(f"{base}_stderr{comma}{kind}"))


def _share_clause(evaluation: EvaluationResult) -> str:
    for share, whose in (
        (evaluation.bound_share, "the bound's gain"),
        (evaluation.fine_tuned_share, "full fine-tuning's gain"),
    ):
        if share is None or not math.isfinite(share):
            continue
        percent = f"{_signed(round(100 * share), 0)}% of {whose}"
        if round(100 * share) < 0:
            return f"the plug-in is worse than the full model zero-shot ({percent})"
        return f"the plug-in reaches {percent}"
    return ""


def _gap_clause(kind: str, gap: float | None, unit: str, negative: str) -> str:
    if gap is None or not math.isfinite(gap):
        return ""
    if round(gap, 3) < 0:
        return f"the {kind} gap is negative, {_number(gap)}{unit} ({negative})"
    return f"the {kind} gap is {_number(gap)}{unit}"


def _gaps(evaluation: EvaluationResult) -> dict[str, Gaps]:
    nats = evaluation.gap_metric == "nats_per_token"
    overall = "Nats per token" if nats else "Mean task score"
    found = {overall: evaluation.gaps, **evaluation.task_gaps}
    return {
        name: gaps
        for name, gaps in found.items()
        if gaps.utility is not None or gaps.privacy is not None
    }


def _bars(evaluation: EvaluationResult) -> tuple[str, list[Bar]]:
    """Return the heading of the chart and its bars: nats, or scores where there is no text."""
    rows = settings_rows(evaluation)
    title = "Nats per token (lower is better)"
    values = [(row, row.nats_per_token) for row in rows]
    if all(value is None for _, value in values):
        title = "Mean task score (higher is better)"
        values = [(row, row.mean_score) for row in rows]
    known = [(row, value) for row, value in values if value is not None and not math.isnan(value)]
    longest = max((value for _, value in known if math.isfinite(value)), default=0.0)
    return title, [
        Bar(
            name=row.name,
            label=row.label,
            value=value,
            share=min(1.0, max(0.0, value / longest)) if longest > 0 else 0.0,
        )
        for row, value in known
    ]


def _drawn(panels: Sequence[Panel]) -> list[tuple[Panel, Any]]:
    from markupsafe import Markup

    return [(panel, Markup(panel_svg(panel))) for panel in panels]


def _cost(run: TrainingHistory, window: int) -> str:
    steps = run.steps[-1].step if run.steps else None
    parts = [
        None if steps is None else f"{steps:,} steps",
        None if run.seconds is None else _duration(run.seconds),
        None if run.num_tokens is None else f"{run.num_tokens:,} tokens",
        None if run.peak_memory_bytes is None else f"peak memory {_size(run.peak_memory_bytes)}",
        None if window == 1 else f"training curve in means of {window} steps",
    ]
    return ", ".join(filter(None, parts))


def _facts(evaluation: EvaluationResult, facts: Mapping[str, str]) -> dict[str, str]:
    versions = ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())
    own = {
        "Evaluation time": "" if evaluation.seconds is None else _duration(evaluation.seconds),
        "Versions": versions,
        "Date": evaluation.date or "",
    }
    return {**facts, **{name: text for name, text in own.items() if text and name not in facts}}


def _template() -> Any:
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": _number,
        "perplexity": _perplexity,
        "score": _score,
        "size": _size,
        "duration": _duration,
    }
    source = files("offsite_ray").joinpath("report_template.html").read_text(encoding="utf-8")
    return environment.from_string(source)


def _signed(value: float, digits: int) -> str:
    """Return a number with a true minus sign, and no sign where it rounds to zero."""
    if math.isnan(value):
        return NOT_MEASURED
    sign = "\N{MINUS SIGN}" if value < 0 and round(value, digits) != 0 else ""
    return sign + ("∞" if math.isinf(value) else f"{abs(value):,.{digits}f}")


def _number(value: float | None) -> str:
    return NOT_MEASURED if value is None else _signed(value, 3)


def _perplexity(value: float | None) -> str:
    if value is None or not math.isfinite(value) or value < 1000:
        return NOT_MEASURED if value is None else _signed(value, 2)
    return f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def _score(score: Score | None) -> str:
    if score is None or score.stderr is None:
        return NOT_MEASURED if score is None else _number(score.value)
    return f"{_number(score.value)} ± {_number(score.stderr)}"


def _size(size: int | None) -> str:
    return NOT_MEASURED if size is None else bytes_text(size)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return NOT_MEASURED
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _write_all(contents: Mapping[Path, bytes]) -> None:
    """Write every file to a temporary sibling first, then rename them all."""
    siblings = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp") for path in contents}
    missing = [folder for folder in next(iter(contents)).parents if not folder.exists()]
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder")
            siblings[path].write_bytes(content)
        for path, sibling in siblings.items():
            sibling.replace(path)
    except OSError as error:
        folder = next(iter(contents)).parent
        reason = error.strerror or error
        raise StorageError(
            f"cannot write the report to {str(folder)!r}: {reason}; choose another folder"
        ) from error
    finally:
        for sibling in siblings.values():
            with contextlib.suppress(OSError):
                sibling.unlink()
        for folder in missing:
            with contextlib.suppress(OSError):  # it holds the report
                folder.rmdir()
