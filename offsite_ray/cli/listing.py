# SPDX-License-Identifier: Apache-2.0
"""Runs on the command line: a table, or one run with its attempts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from offsite_ray.cli.output import Outcome, printable
from offsite_ray.config import RUNS
from offsite_ray.errors import ConfigError
from offsite_ray.runs import list_runs
from offsite_ray.runs.record import utc_now

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from offsite_ray.config import RunsConfig

_COLUMNS = ("name", "verb", "status", "attempts", "started", "seen", "GPU h", "CPU h", "made")


def listed(config: RunsConfig) -> Outcome:
    """Return the runs of a directory.

    Raises:
        ConfigError: There is no directory to look into.
        StorageError: It cannot be read, or there is no such run.
    """
    runs = config.runs or os.environ.get(RUNS)
    if not runs:
        raise ConfigError(f"which runs? give --runs DIR, or set {RUNS}")
    now = utc_now()
    plain = [run.to_json(now) for run in list_runs(runs, config.name)]
    if config.name is not None:
        return Outcome(plain=plain[0])
    return Outcome(plain={"runs": plain}, table=_table(plain))


def _table(runs: Sequence[Mapping[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(*_COLUMNS)
    for run in runs:
        hours = [run["device_hours"][kind] for kind in ("gpu", "cpu")]
        made = [artefact["path"] for artefact in run["artefacts"] if artefact["kind"] == "out"]
        cells = [
            *(run["name"], run["verb"], run["status"], str(len(run["attempts"]))),
            *(run["started"], run["seen"]),
            *("not measured" if value is None else f"{value:.3g}" for value in hours),
            " ".join(made),
        ]
        table.add_row(*map(printable, cells))
    return table
