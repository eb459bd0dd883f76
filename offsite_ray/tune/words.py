# SPDX-License-Identifier: Apache-2.0
"""Points in words: what tells one from the others, each in a line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from offsite_ray.tune.space import STAGES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offsite_ray.tune.front import Distilled
    from offsite_ray.tune.table import Row

_IN_COLUMNS = (
    "compress.plan", "compress.select", "compress.compress", "distill.max_steps",
    "finetune.method", "finetune.learning_rate",
)  # fmt: skip
"""Settings that each point shows in a place of their own."""


def in_words(row: Row, others: Mapping[str, Sequence[str]]) -> str:
    """Return what tells a point from others, in a line.

    Args:
        row: Of the point.
        others: What :func:`other_settings` gave for it.
    """
    steps = row["distill_steps"]
    parts = [
        row["plan"],
        row["select"],
        None if row["compress"] in (None, "none") else row["compress"],
        f"{steps} steps" if steps else "not distilled",
        None if row["method"] in (None, "full") else row["method"],
        None if row["learning_rate"] is None else f"fine-tuned at {row['learning_rate']:g}",
        *(part for stage in others.values() for part in stage),
    ]
    return " ".join(str(part) for part in parts if part)


def knob_in_words(row: Distilled) -> str:
    """Return how much is distilled at a setting of the knob, and what it costs and protects."""
    bound = row.bound_gap is not None
    utility = row.bound_gap if bound else row.utility_gap
    parts = (row.select, row.compress, row.method)
    how = ", ".join(part for part in parts if part not in ("none", "full"))
    return (
        f"{row.distill_steps} steps of {row.num_emulator_blocks} emulator blocks ({how}): "
        f"gap to {'the bound' if bound else 'full fine-tuning'} {utility:.3f}, privacy gap "
        f"{row.privacy_gap:.3f}"
    )


def other_settings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, list[str]]]:
    """Return for each row, by verb, the settings that no column has and that not all share."""
    shared = common_settings(rows)
    return [
        {
            stage: [part for part in parts if part not in shared[stage]]
            for stage, parts in of.items()
        }
        for of in map(_parts, rows)
    ]


def common_settings(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return by verb the settings that no column has, of all rows for which the verb is run."""
    found: dict[str, list[str]] = {}
    for stage in STAGES:
        lists = [parts[stage] for parts in map(_parts, rows) if stage in parts]
        first = lists[0] if lists else []
        found[stage] = [part for part in first if all(part in other for other in lists)]
    return found


def _parts(row: Mapping[str, Any]) -> dict[str, list[str]]:
    settings = json.loads(row["settings"]) if row["settings"] else {}
    return {
        stage: [f"{stage}.{n}={v}" for n, v in fields.items() if f"{stage}.{n}" not in _IN_COLUMNS]
        for stage, fields in settings.items()
    }
