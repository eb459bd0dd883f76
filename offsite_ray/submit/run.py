# SPDX-License-Identifier: Apache-2.0
"""Runs by their name: one job at a time, the next one going on where the last one stopped."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from typing import TYPE_CHECKING

from offsite_ray import __version__
from offsite_ray.errors import ClusterError, ConfigError, JobError, unknown_name
from offsite_ray.submit.packing import packed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offsite_ray.config import SubmitConfig
    from offsite_ray.submit.server import Job, JobServer

_STOP_S = 60.0
"""That a job has to end; Ray kills it after a few seconds."""


def submit(
    server: JobServer,
    config: SubmitConfig,
    recipe: bytes,
    words: Sequence[str],
    notice: Callable[[str], None],
) -> Job:
    """Submit a run's next job, unless the last one has done all of it.

    Args:
        server: Of the cluster.
        config: What is to run and where.
        recipe: From :func:`read_recipe`.
        words: What stands behind the verb and the recipe.
        notice: Told what is going on.

    Raises:
        ConfigError: The run is at work, or of another verb.
    """
    name = config.run_name
    before = [job for job in server.jobs() if job.name == name]
    asked = json.dumps([__version__, config.verb, config.root, list(words), recipe.hex()])
    digest = hashlib.sha256(asked.encode()).hexdigest()
    if before and _is_done(before[-1], config.verb, digest):
        notice(f"{before[-1].job} has done this already; another --name and --out do it again")
        return before[-1]
    recorded = config.runs_directory
    kept = [] if recorded is None else ["--run", name, "--runs", recorded]
    number = max((job.number for job in before), default=0) + 1
    with packed(recipe, config.packages) as environment:
        job = server.submit(
            name,
            number,
            shlex.join(
                [
                    *("python", "-m", "offsite_ray.cli.job", config.root or ".", config.verb),
                    *(*kept, *words),
                ]
            ),
            runtime_env=environment,
            metadata={
                "job_name": name,
                "offsite_ray_verb": config.verb,
                "offsite_ray_digest": digest,
            },
            entrypoint_num_cpus=config.driver_cpus,
            entrypoint_num_gpus=config.driver_gpus,
            entrypoint_resources=dict(config.driver_resources or {}),
            entrypoint_label_selector=dict(config.driver_labels or {}),
        )
    # Before it is looked up: the connection may be lost by then.
    notice(f"submitted {job}" + (f", which goes on with {before[-1].job}" if before else ""))
    return server.job(job)


def _is_done(last: Job, verb: str, digest: str) -> bool:
    """Return whether the last job of a run has done all that is asked; refuse what cannot be."""
    if not last.ended:
        of = f"offsite-ray submit {{}} --name {last.name}"
        raise ConfigError(
            f"{last.name!r} is at work, as {last.job} ({last.status}); follow it with "
            f"'{of.format('status')} --follow', stop it with '{of.format('stop')}', or choose "
            "another --name"
        )
    if last.verb != verb:
        what = f"a run of {last.verb}" if last.verb else "a job of others"
        raise ConfigError(f"{last.job} is {what}, not of {verb}; choose another --name")
    return last.status == "SUCCEEDED" and last.digest == digest


def run_named(server: JobServer, name: str) -> Job:
    """Return the last job of a run.

    Raises:
        ConfigError: There is no run of this name.
    """
    jobs = {job.name: job for job in server.jobs()}
    if name not in jobs:
        known = unknown_name("run", name, jobs)
        raise ConfigError(f"{known} at {server.address}; 'offsite-ray submit list' lists them")
    return jobs[name]


def stop(server: JobServer, name: str) -> Job:
    """Stop a run, if it is at work, and return its last job.

    Raises:
        ClusterError: It does not end.
    """
    last = run_named(server, name)
    if not last.ended:
        server.stop(last.job)
    until = time.monotonic() + _STOP_S
    while not last.ended:
        if time.monotonic() > until:
            raise ClusterError(
                f"{last.job} is still {last.status} after {_STOP_S:.0f} s; what is PENDING ends "
                "when Ray has a node for it, or gives it up"
            )
        time.sleep(0.2)
        last = server.job(last.job)
    return last


def ended_well(job: Job) -> Job:
    """Return a job that did what it was to do.

    Raises:
        JobError: It did not; with its exit status.
    """
    if job.status == "SUCCEEDED":
        return job
    how = {"FAILED": f"failed with exit status {job.exit_status}: {job.message}"}
    again = "; submit it again under the same name, and it goes on with what is on disk"
    if job.exit_status == ConfigError.exit_status:  # as it is asked for it can never be done
        again = ""
    raise JobError(f"{job.job} {how.get(job.status, 'was stopped')}{again}", job.exit_status or 1)
