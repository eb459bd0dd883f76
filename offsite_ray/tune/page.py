# SPDX-License-Identifier: Apache-2.0
"""The report of a sweep: one page that stands alone, with plots to point at.

The numbers are in the page as JSON; its script draws them, so that plots, table and the weight of
privacy can be moved together. Without a script the page still has its table.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from offsite_ray.bundle import atomic_file
from offsite_ray.results import SETTINGS
from offsite_ray.tune.folders import FAILED, FINISHED
from offsite_ray.tune.front import OBJECTIVES, behind, worths, yardstick
from offsite_ray.tune.plan import Job
from offsite_ray.tune.recipe import label_of
from offsite_ray.tune.series import compression, kinds, placements
from offsite_ray.tune.table import GAPS, Row, Summary, quality
from offsite_ray.tune.words import common_settings, other_settings
from offsite_ray.uris import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from offsite_ray.config import SweepConfig

_SHOWN = ("plug_in", "emulator_fine_tuned", "emulator_zero_shot", "bound", *GAPS)
"""Numbers of a point that the page has, with their spread."""

DEEP = "as deep as the full model"
"""Said of an emulator where copies or harmonizers stand in the place of dropped blocks."""


def write_page(
    path: Path,
    config: SweepConfig,
    rows: Sequence[Row],
    points: Sequence[Summary],
    best: Sequence[Summary],
    winner: Summary | None,
) -> None:
    """Write the page, whole or not at all."""
    from markupsafe import Markup

    data = page_data(config, rows, points, best, winner)
    # "<" cannot stand in a script: it might end it.
    embedded = Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
    page = _template().render(
        title=data["title"],
        sentence=sentence(winner, points, config),
        data=data,
        embedded=embedded,
        script=Markup(_file("drawing.js") + _file("page.js")),
        failures=[row for row in rows if row["status"] == FAILED],
        facts=_facts(config, rows, points),
    )
    with atomic_file(path) as tmp:
        tmp.write_text(page, encoding="utf-8")


def page_data(
    config: SweepConfig,
    rows: Sequence[Row],
    points: Sequence[Summary],
    best: Sequence[Summary],
    winner: Summary | None,
) -> dict[str, Any]:
    """Return what the page draws, as plain values that JSON holds."""
    from pathlib import Path

    nats = any(row["plug_in_nats"] is not None for row in rows)
    front = {point.point for point in best}
    utility = {"bound": "bound_gap", "full_fine_tuned": "utility_gap"}[yardstick(points)]
    others, gaps = other_settings([point.row for point in points]), behind(points)
    where = placements(rows)
    tuned, num_tuned = _best_of(rows, "fine_tuned", "full_fine_tuned")
    drawn = [
        _point(point, other, where, nats=nats)
        | {"front": point.point in front, "behind": gaps[point.point]}
        for point, other in zip(points, others, strict=True)
    ]
    worth_of = worths(points, config.privacy_weight)
    drawn.sort(key=lambda point: math.inf if (w := worth_of[point["id"]]) is None else -w)
    return {
        "title": f"Sweep of {Path(shown(config.model)).resolve().name}",
        "unit": "nats per token" if nats else "mean task score",
        "lower": nats,
        "weight": config.privacy_weight,
        "objectives": [OBJECTIVES[name].label for name in config.objectives],
        "winner": None if winner is None else winner.point,
        "points": drawn,
        "utility": utility,
        "kinds": list(kinds(drawn, utility).items()),
        "compression": compression(drawn, lower=nats),
        "placements": _placements(rows, where, nats=nats),
        "yardsticks": {
            "full_zero_shot": _best_of(rows, "full", "full_zero_shot")[0],
            "full_fine_tuned": tuned,
            "full_fine_tuned_label": "full fine-tuning"
            + (f", best of {num_tuned}" if num_tuned > 1 else ""),
        },
    }


def sentence(winner: Summary | None, points: Sequence[Summary], config: SweepConfig) -> str:
    """Return the result in one sentence."""
    if points and all(point.hands_all for point in points):
        return "Nothing is dropped or compressed here: every point is the bound of its placement."
    if winner is None:
        return "No emulator was measured beside what it must be judged against."
    mean, row = winner.mean, winner.row
    distilled = f"distilled for {row['distill_steps']} steps" if row["distill_steps"] else "as cut"
    how = f"{row['select']}, {distilled}" + (f", {DEEP}" if _is_as_deep(row) else "")
    number = sum(not point.hands_all for point in points)
    found = f"Of {number} emulators, {row['plan']} ({how}) is chosen"
    parts = [
        _told("utility gap to the bound", mean["bound_gap"], winner.spread["bound_gap"]),
        _told("utility gap to full fine-tuning", mean["utility_gap"], winner.spread["utility_gap"]),
        _told("privacy gap", mean["privacy_gap"], winner.spread["privacy_gap"]),
    ]
    said = ", ".join(filter(None, parts))
    weight = f" for a privacy weight of {config.privacy_weight:g}"
    return f"{found}{weight if len(config.objectives) > 1 else ''}: {said}."


def _told(name: str, mean: float | None, spread: float | None) -> str:
    if mean is None:
        return ""
    return f"{name} {mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _point(
    point: Summary,
    other: Mapping[str, Sequence[str]],
    where: Mapping[str | None, str],
    *,
    nats: bool,
) -> dict[str, Any]:
    row = point.row
    unit = "nats" if nats else "score"
    numbers = {}
    for name in _SHOWN:
        column = name if name in GAPS else f"{name}_{unit}"
        numbers[name] = [point.mean[column], point.spread[column]]
    return {
        "id": point.point,
        "plan": row["plan"],
        "select": row["select"],
        "compress": row["compress"],
        "method": row["method"],
        "control": row["control"],
        "learning_rate": row["learning_rate"],
        "steps": row["distill_steps"] or 0,
        "placement": where[row["adapter_blocks"]],
        "adapter_blocks": row["num_adapter_blocks"],
        "emulator_blocks": row["num_emulator_blocks"],
        "deep": DEEP if _is_as_deep(row) else "",
        "share": _share(row),
        "bytes": row["bundle_bytes"],
        "seconds": point.mean["seconds"],
        "seeds": len(point.seeds),
        "stopped": point.num_stopped,
        "failed": point.num_failed,
        "competes": point.competes,
        "other": ", ".join(part for parts in other.values() for part in parts),
        "others": dict(other),
        **numbers,
    }


def _share(row: Mapping[str, Any]) -> float | None:
    if not row["bundle_bytes"] or not row["full_model_bytes"]:
        return None
    return float(row["bundle_bytes"] / row["full_model_bytes"])


def _is_as_deep(row: Mapping[str, Any]) -> bool:
    """Return whether something stands in the place of each block that an emulator dropped."""
    own = (row["num_adapter_blocks"] or 0) + (row["num_emulator_blocks"] or 0)
    return row["depth"] is not None and bool(row["depth"] > own)


def _placements(
    rows: Iterable[Row], where: Mapping[str | None, str], *, nats: bool
) -> list[dict[str, Any]]:
    """Return the bound of every placement, mean over its seeds: Figure 3 of the paper."""
    unit = "nats" if nats else "score"
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["role"] == "bound" and row[f"bound_{unit}"] is not None:
            groups.setdefault(row["point"], []).append(row)
    firsts = [found[0] for found in groups.values()]
    rates = {row["learning_rate"] for row in firsts}
    return [
        {
            "kind": _placed(row, other, where, several_rates=len(rates) > 1),
            "adapter_blocks": row["num_adapter_blocks"],
            "blocks": row["adapter_blocks"],
            "value": sum(row[f"bound_{unit}"] for row in found) / len(found),
        }
        for row, other, found in zip(firsts, other_settings(firsts), groups.values(), strict=True)
    ]


def _placed(
    row: Row,
    other: Mapping[str, Sequence[str]],
    where: Mapping[str | None, str],
    *,
    several_rates: bool,
) -> str:
    """Return what the bounds of one line have in common, in words."""
    parts = (
        where[row["adapter_blocks"]],
        "" if row["method"] == "full" else row["method"],
        f"lr {row['learning_rate']:g}" if several_rates and row["learning_rate"] else "",
        *other.get("finetune", ()),
    )
    return ", ".join(filter(None, parts))


def _best_of(rows: Iterable[Row], role: str, setting: str) -> tuple[float | None, int]:
    """Return the best of what is measured once for many points, and of how many; seeds' means."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row["role"] == role and (value := quality(row, setting)) is not None:
            groups.setdefault(row["point"], []).append(value)
    means = [sum(values) / len(values) for values in groups.values()]
    return (abs(max(means)) if means else None), len(means)


def _facts(config: SweepConfig, rows: Sequence[Row], points: Sequence[Summary]) -> dict[str, str]:
    # A point that is its own bound has a row, and was not run.
    ran = [row for row in rows if row["status"] != FINISHED or row["seconds"] is not None]
    statuses = [row["status"] for row in ran]
    counted = ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses))
    versions: dict[str, str] = next(
        (json.loads(row["versions"]) for row in rows if row["versions"]), {}
    )
    alike = common_settings([point.row for point in points])
    found = {
        "Model": shown(config.model),
        "Jobs": f"{len(ran)}: {counted}" if ran else "none",
        "Emulators": f"{len(points)}, {config.seeds} seed{'s' * (config.seeds > 1)} each",
        "Search": config.search + (f", preset {config.preset}" if config.preset else ""),
        "Measured on": ", ".join((*config.text, *config.tasks)),
        "Sequences": f"{config.seq_len} tokens, {config.dtype}",
        "All alike": ", ".join(part for parts in alike.values() for part in parts),
        "Objectives": ", ".join(config.objectives),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Last result": max((str(row["date"]) for row in rows), default=""),
    }
    return {name: text for name, text in found.items() if text}


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"pair": _pair, "label": _job_label}
    environment.globals["settings"] = SETTINGS
    return environment.from_string(_file("page.html"))


def _pair(numbers: Sequence[float | None]) -> str:
    mean, spread = numbers
    if mean is None:
        return "\N{EN DASH}"
    return f"{mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _job_label(row: Row) -> str:
    job = {"role": row["role"], "seed": row["seed"], "control": row["control"]}
    return label_of(Job.from_plain({**job, "settings": json.loads(row["settings"])}))


def _file(name: str) -> str:
    from importlib.resources import files

    return files("offsite_ray.tune").joinpath(name).read_text(encoding="utf-8")
