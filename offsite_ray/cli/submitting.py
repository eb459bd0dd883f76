# SPDX-License-Identifier: Apache-2.0
"""Jobs from the command line: submit, follow, list, stop; a job's log goes to stderr."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.cli.output import Outcome, printable
from offsite_ray.config import check_address
from offsite_ray.errors import ConfigError
from offsite_ray.results import to_plain
from offsite_ray.submit import (
    ADDRESS,
    JobServer,
    ended_well,
    follow,
    read_recipe,
    run_named,
    stop,
    submit,
)
from offsite_ray.uris import is_uri

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.table import Table

    from offsite_ray.config import SubmitConfig
    from offsite_ray.submit import Job

_COLUMNS = ("name", "job", "verb", "status", "exit_status", "started", "seconds")


def run_as_job(
    config: SubmitConfig, asked: Mapping[str, Any], notice: Callable[[str], None]
) -> Outcome:
    """Submit a verb, and follow it where that is wanted.

    Args:
        config: What is to run and where.
        asked: What the recipe and its changes ask of the verb.
        notice: Told what is going on.

    Raises:
        ConfigError: The result would be lost with the job's own folder, or the recipe cannot be
            sent, or the run is at work.
        JobError: The job was followed, and failed.
    """
    out = asked.get("out")
    if config.root is None and out and not Path(out).is_absolute() and not is_uri(out):
        raise ConfigError(
            f"out={out!r} is below no folder that outlives the job; give --root DIR, which every "
            "node sees, or a whole path"
        )
    # What there is to go on with is found on disk; where there is nothing, it begins.
    resumes = ["resume=true"] if "resume" in asked else []
    recipe = read_recipe(config)
    server = _server(config)
    job = submit(server, config, recipe, [*resumes, *config.words], notice)
    return _outcome(server, job, config, notice)


def _list(config: SubmitConfig, notice: Callable[[str], None]) -> Outcome:
    jobs = [job for job in _server(config).jobs() if job.verb is not None]
    if config.name is not None:
        jobs = [job for job in jobs if job.name == config.name]
    return Outcome(plain={"jobs": [_plain(job) for job in jobs]}, table=_table(jobs))


def _status(config: SubmitConfig, notice: Callable[[str], None]) -> Outcome:
    server = _server(config)
    return _outcome(server, run_named(server, config.name or ""), config, notice)


def _stop(config: SubmitConfig, notice: Callable[[str], None]) -> Outcome:
    return Outcome(plain=_plain(stop(_server(config), config.name or "")))


ON_JOBS: dict[str, Callable[[SubmitConfig, Callable[[str], None]], Outcome]] = {
    "list": _list,
    "status": _status,
    "stop": _stop,
}
"""What can be asked in the place of a verb."""


def _server(config: SubmitConfig) -> JobServer:
    address = config.address or os.environ.get(ADDRESS)
    if not address:
        raise ConfigError(f"no cluster: give --address http://HEAD:8265, or set {ADDRESS}")
    check_address(address)
    return JobServer(address)


def _outcome(
    server: JobServer, job: Job, config: SubmitConfig, notice: Callable[[str], None]
) -> Outcome:
    """Return a job as it is, or followed to a good end."""
    if not config.follow:
        return Outcome(plain=_plain(job))
    try:
        ended = follow(server, job.job, _show, notice, config.reconnect_timeout)
    except KeyboardInterrupt:
        notice(f"{job.job} goes on; 'offsite-ray submit stop --name {job.name}' stops it")
        raise
    return Outcome(plain=_plain(ended_well(ended)))


def _show(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _plain(job: Job) -> dict[str, Any]:
    return {key: value for key, value in to_plain(job).items() if key != "digest"}


def _table(jobs: Sequence[Job]) -> Table:
    from rich.table import Table

    table = Table(*(name.replace("_", " ") for name in _COLUMNS))
    for job in jobs:
        cells = (getattr(job, name) for name in _COLUMNS)
        table.add_row(*("" if cell is None else printable(str(cell)) for cell in cells))
    return table
