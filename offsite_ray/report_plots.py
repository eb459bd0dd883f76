# SPDX-License-Identifier: Apache-2.0
"""The plots of a report: bars of the settings and loss curves, as SVG to inline and as one PNG."""

from __future__ import annotations

import io
import math
import re
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offsite_ray.results import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from offsite_ray.results import EvalRecord, StepRecord, TrainingHistory

_MOST_POINTS = 500
"""Points of a training curve; beyond, each point is the mean of some steps."""

_LOG_RATIO = 50.0
"""A curve that spans more than this factor is drawn on a logarithmic axis."""

_MOST_PNG_PANELS = 4
_FOOT, _HEIGHT = 0.12, 0.63
"""Where the plots of the PNG stand, in parts of its height."""

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One bar of the chart of the settings."""

    name: str
    label: str
    value: float
    share: float
    """Length, from 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One part of the loss in one training run."""

    history: str
    part: str
    title: str
    unit: str
    training: tuple[tuple[float, float], ...]
    """Step and loss."""
    held_out: tuple[tuple[float, float], ...]
    window: int
    """Steps that a point of ``training`` is the mean of."""


@dataclass(frozen=True, slots=True)
class _Colours:
    ink: str
    muted: str
    rule: str
    accent: str
    soft: str


_PRINT = _Colours(ink="#1c1f23", muted="#636a73", rule="#dfe2e6", accent="#1f5aa8", soft="#b9cbe4")
# An SVG in a page takes the page's colours: these stand in for them while it is drawn.
_PAGE = _Colours(ink="#010203", muted="#020304", rule="#030405", accent="#040506", soft="#050607")
_VARIABLES = {
    _PAGE.ink: "currentColor",
    _PAGE.muted: "var(--muted)",
    _PAGE.rule: "var(--rule)",
    _PAGE.accent: "var(--accent)",
    _PAGE.soft: "var(--soft)",
}


def panels_of(name: str, history: TrainingHistory) -> list[Panel]:
    """Return a panel for each part of the loss of a run, the weighted sum first.

    The sum is left out where it is the same as a part of it.
    """
    records: list[StepRecord | EvalRecord] = [*history.steps, *history.evaluations]
    parts = sorted({part for record in records for part in record.losses}, key=_sum_first)
    others = [part for part in parts if part != "loss"]
    if any(all(r.losses.get("loss") == r.losses.get(part) for r in records) for part in others):
        parts = others
    panels = []
    for part in parts:
        window = max(1, math.ceil(len(history.steps) / _MOST_POINTS))
        steps = [(float(r.step), r.losses[part]) for r in history.steps if part in r.losses]
        held = [(float(r.step), r.losses[part]) for r in history.evaluations if part in r.losses]
        title, unit = _words(part, has_others=bool(others))
        panels.append(
            Panel(
                history=name,
                part=part,
                title=title,
                unit=unit,
                training=_thinned(steps, window),
                held_out=tuple(held),
                window=window,
            )
        )
    return panels


def panel_svg(panel: Panel) -> str:
    """Return the panel as an ``<svg>`` element in the colours of the page that holds it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    salt = f"{panel.history}/{panel.part}"  # ids must differ between the panels of a page
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(3.5, 2.3), layout="constrained")
        _draw_panel(figure.add_subplot(), panel, _PAGE)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return _inline(buffer.getvalue(), f"{panel.history}: {panel.title} over optimizer steps")


def summary_png(
    title: str, sentence: str, bars: Sequence[Bar], bars_title: str, panels: Sequence[Panel]
) -> bytes:
    """Return one picture of the settings and, beside them, at most four loss curves."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    chosen = _most_telling(panels)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(32 / 3, 20 / 3), dpi=150, facecolor="white")
        _draw_heading(figure, title, sentence)
        right = 0.54 if chosen else 0.97
        axes = figure.add_axes((0.165, _FOOT, right - 0.165, _HEIGHT))
        _draw_bars(axes, bars, bars_title, _PRINT)
        _draw_column(figure, chosen)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _sum_first(part: str) -> tuple[bool, str]:
    return part != "loss", part


_KNOWN = {
    "lm": ("Language modelling", "nats per token"),
    "hidden": ("Hidden states", "error over power"),
}
"""Part of a loss to its title and the text of its y axis."""


def _words(part: str, *, has_others: bool) -> tuple[str, str]:
    """Return a title and the text of the y axis; only a lone loss is known to be in nats."""
    if part == "loss":
        return "Loss", "weighted sum of the parts" if has_others else "nats"
    title = part.replace("_", " ")
    return _KNOWN.get(part, (title[:1].upper() + title[1:], "before weighting"))


def _thinned(points: list[tuple[float, float]], window: int) -> tuple[tuple[float, float], ...]:
    groups = (points[start : start + window] for start in range(0, len(points), window))
    return tuple(
        (sum(step for step, _ in group) / len(group), sum(loss for _, loss in group) / len(group))
        for group in groups
    )


def _most_telling(panels: Sequence[Panel]) -> list[Panel]:
    """Return the first panel of every history, then the others, as many as the PNG holds."""
    first = {panel.history: panel for panel in reversed(panels)}
    ordered = sorted(panels, key=lambda panel: first[panel.history] is not panel)
    return sorted(ordered[:_MOST_PNG_PANELS], key=list(panels).index)


def _draw_panel(axes: Axes, panel: Panel, colours: _Colours) -> None:
    from matplotlib.ticker import MaxNLocator

    for points, style in (
        (panel.training, {"color": colours.muted, "linewidth": 0.8}),
        (
            panel.held_out,
            {"color": colours.accent, "linewidth": 1.8, "marker": "o", "clip_on": False},
        ),
    ):
        finite = [(x, y if math.isfinite(y) else math.nan) for x, y in points]
        if finite:
            axes.plot(*zip(*finite, strict=True), markersize=4.0, **style)  # type: ignore[arg-type]
    losses = [y for _, y in (*panel.training, *panel.held_out) if math.isfinite(y)]
    unit = panel.unit
    if losses and min(losses) > 0 and max(losses) / min(losses) > _LOG_RATIO:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        unit = f"{unit}, log scale"
    axes.set_xlabel("optimizer steps", color=colours.muted)
    axes.set_ylabel(unit, color=colours.muted)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    _quieten(axes, colours)
    axes.grid(axis="y", color=colours.rule, linewidth=0.6)
    axes.set_axisbelow(True)


def _quieten(axes: Axes, colours: _Colours) -> None:
    axes.tick_params(which="both", color=colours.rule, labelcolor=colours.muted)
    for spine in axes.spines.values():
        spine.set_color(colours.rule)


def _draw_heading(figure: Figure, title: str, sentence: str) -> None:
    figure.text(
        0.03, 0.95, textwrap.shorten(title, 90, placeholder=" …"),
        fontsize=16, fontweight="bold", color=_PRINT.ink, va="top", parse_math=False,
    )  # fmt: skip
    figure.text(
        0.03, 0.895, textwrap.fill(sentence, 120, max_lines=3, placeholder=" …"),
        fontsize=10.5, color=_PRINT.ink, va="top", linespacing=1.45, parse_math=False,
    )  # fmt: skip


def _draw_bars(axes: Axes, bars: Sequence[Bar], title: str, colours: _Colours) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=colours.ink, fontweight="bold", pad=10)
    axes.set_xlim(0, 1.14)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    if not bars:
        axes.set_yticks([])
        axes.text(0, 0.5, "not measured", color=colours.muted)
        return
    for place, bar in enumerate(bars):
        chosen = bar.name == "plug_in"
        axes.barh(place, bar.share, height=0.62, color=colours.accent if chosen else colours.soft)
        axes.text(
            bar.share + 0.015, place, f"{bar.value:.3f}",
            va="center", color=colours.ink, fontweight="bold" if chosen else "normal",
        )  # fmt: skip
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.set_ylim(max(len(bars), len(SETTINGS)) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelcolor=colours.ink, labelsize=10)
    axes.spines["left"].set_color(colours.rule)
    axes.spines["left"].set_bounds(-0.5, len(bars) - 0.5)


def _draw_column(figure: Figure, panels: Sequence[Panel]) -> None:
    """Draw the loss curves below each other, from the top of the bars to their foot."""
    space = 0.1
    height = (_HEIGHT + space) / max(len(panels), 1)
    for place, panel in enumerate(panels):
        bottom = _FOOT + height * (len(panels) - 1 - place)
        axes = figure.add_axes((0.62, bottom, 0.35, height - space))
        _draw_panel(axes, panel, _PRINT)
        axes.set_title(
            f"{panel.history}: {panel.title.lower()}", loc="left",
            fontsize=10.5, color=_PRINT.ink, fontweight="bold", pad=6, parse_math=False,
        )  # fmt: skip
        axes.set_title(axes.get_ylabel(), loc="right", color=_PRINT.muted, fontsize=9, pad=6)
        axes.set_ylabel("")
        if place < len(panels) - 1:
            axes.set_xlabel("")
    if panels:
        words = "thin line: training, line with dots: held-out"
        figure.text(0.97, 0.025, words, ha="right", color=_PRINT.muted)


def _inline(document: str, label: str) -> str:
    """Return the ``<svg>`` element of a document without size, metadata and namespaces."""
    from html import escape

    body = document[document.index("<svg") :]
    view_box = body.split('viewBox="', 1)[1].split('"', 1)[0]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body[body.index(">") + 1 :])
    body = body.replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    opening = f'<svg viewBox="{view_box}" role="img" aria-label="{escape(label)}">'
    return opening + body.strip()


def by_history(
    histories: Mapping[str, TrainingHistory],
) -> list[tuple[str, TrainingHistory, list[Panel]]]:
    """Return every run that has a loss, with its panels."""
    found = ((name, run, panels_of(name, run)) for name, run in histories.items())
    return [(name, run, panels) for name, run, panels in found if panels]
