# SPDX-License-Identifier: Apache-2.0
"""Preflight from the command line: of this machine, of the Ray at hand, of a cluster by a job."""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.cli.output import Outcome
from offsite_ray.config import SubmitConfig
from offsite_ray.doctor import (
    Facts,
    asked_without_token,
    examine_ray,
    facts_from_plain,
    judge,
    measure,
    tables,
    versions,
)
from offsite_ray.errors import ClusterError, UnfitError
from offsite_ray.results import to_plain
from offsite_ray.submit import ADDRESS, JobServer, ended_well, follow, read_recipe, submit
from offsite_ray.uris import is_uri

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offsite_ray.config import DoctorConfig

_LOST_S = 60.0
"""Without the job server, after which the examination is given up."""


def doctor(config: DoctorConfig, notice: Callable[[str], None]) -> Outcome:
    """Examine, judge and show; the outcome ends with an error where a check failed.

    Args:
        config: What to examine, and the limits.
        notice: Told what is going on.

    Raises:
        ClusterError: The cluster could not be asked.
    """
    facts = _examined(config, notice)
    findings = judge(facts, config)
    failed = [finding.check for finding in findings if finding.verdict == "failed"]
    plain = {
        "fit": not failed,
        "findings": [to_plain(finding) for finding in findings],
        "facts": [to_plain(one) for one in facts],
    }
    then = (lambda: _refuse(failed)) if failed else None
    return Outcome(plain=plain, table=tables(facts, findings), then=then)


def _refuse(failed: Sequence[str]) -> None:
    raise UnfitError(
        f"not fit: {', '.join(dict.fromkeys(failed))}; each finding says how to mend it"
    )


def _examined(config: DoctorConfig, notice: Callable[[str], None]) -> Sequence[Facts]:
    storage = config.storage
    if config.address is not None:
        return _by_job(config, config.address, notice)
    if storage is not None and not is_uri(storage):
        storage = os.path.abspath(storage)
    if os.environ.get("RAY_ADDRESS"):
        return examine_ray(storage, config.timeout)
    if address := os.environ.get(ADDRESS):
        notice(f"this machine alone; --address {address} examines the cluster of {ADDRESS}")
    return [measure("this machine", storage, config.timeout)]


def _by_job(config: DoctorConfig, address: str, notice: Callable[[str], None]) -> Sequence[Facts]:
    """Have a job of the cluster examine it, and set what is known here before what it tells."""
    server = JobServer(address)
    with tempfile.TemporaryDirectory() as folder:
        # JSON is YAML. Versions are what is asked for: the job itself takes any.
        file = Path(folder) / "doctor.yaml"
        file.write_text(json.dumps({**asdict(config), "address": None}), encoding="utf-8")
        name = f"doctor-{uuid.uuid4().hex[:8]}"
        asked = SubmitConfig(verb="doctor", recipe=str(file), name=name, packages="any")
        job = submit(server, asked, read_recipe(asked), ["--json"], notice)
    log: list[str] = []
    ended = follow(server, job.job, log.append, notice, _LOST_S)
    told = _object_in("".join(log))
    if told is None:
        ended_well(ended)
        raise ClusterError(f"{ended.job} has told nothing; its log is in the dashboard, {address}")
    there, *nodes = map(facts_from_plain, told["facts"])
    seen = {there.open_dashboard, asked_without_token(address)} - {None}
    opened = any(seen) if seen else None
    return [replace(there, versions=versions(), open_dashboard=opened), *nodes]


def _object_in(log: str) -> dict[str, Any] | None:
    """Return the JSON object in a job's log, which has other lines around it."""
    start = f"\n{log}".find("\n{\n")
    if start < 0:
        return None
    found: dict[str, Any] = json.JSONDecoder().raw_decode(log[start:])[0]
    return found
