# SPDX-License-Identifier: Apache-2.0
"""A cluster's job server: what is asked of it, and what its refusals mean."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import ClusterError, ConfigError, JobError, first_line

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

ADDRESS = "RAY_API_SERVER_ADDRESS"
"""Environment variable with the address; in Ray's client it wins over everything else."""

_JOB = re.compile(r"(.+)-(\d+)")
_ANSWER_S = 60.0
"""Without a word, after which nobody answers: a tunnel takes connections though its end is cut."""
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One submission of a run."""

    name: str
    """Of the run."""
    job: str
    """Ray's submission id: the name and a number."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    exit_status: int | None
    """Of the verb; None where it has not ended by itself."""
    verb: str | None
    """None for a job of others."""
    started: str
    seconds: float
    """Since it was submitted, until its end."""
    node: str | None
    """Id of the driver's node."""
    message: str
    """What Ray says of it, in a line."""
    digest: str | None
    """Of all that it was asked to do."""

    @property
    def ended(self) -> bool:
        """Whether it will not go on."""
        return self.status in _ENDED

    @property
    def number(self) -> int:
        """Which submission of the run it is."""
        return int(self.job.rpartition("-")[2])


class JobServer:
    """A cluster's job server."""

    def __init__(self, address: str) -> None:
        """Connect.

        Args:
            address: ``http://HOST:PORT`` of the dashboard.

        Raises:
            ClusterError: Nobody answers there, or no job server.
            ConfigError: It refuses the token.
        """
        from ray.job_submission import JobSubmissionClient

        class Client(JobSubmissionClient):
            """Ray's own waits without end for who takes a connection and says nothing."""

            def _do_request(self, *args: Any, **kwargs: Any) -> Any:
                return super()._do_request(*args, timeout=_ANSWER_S, **kwargs)

        for name in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        self.address = address.rstrip("/")
        with self._plainly(), _address_alone(self.address):
            self._client = Client(self.address)

    def jobs(self) -> list[Job]:
        """Return the jobs whose id is of a name and a number, in the order of their start."""
        with self._plainly():
            found = [_job(details) for details in self._client.list_jobs()]
        return sorted(filter(None, found), key=lambda job: (job.started, job.number))

    def job(self, job: str) -> Job:
        """Return a job as it is now.

        Raises:
            JobError: Nobody knows it.
        """
        for found in self.jobs():
            if found.job == job:
                return found
        raise JobError(
            f"{self.address} knows no job {job!r}; a cluster that is started anew forgets "
            "its jobs: submit the run again, and it goes on with what is on disk"
        )

    def submit(self, name: str, number: int, entrypoint: str, **given: Any) -> str:
        """Submit the next job of a run, and return its id.

        Raises:
            ConfigError: Somebody else has just done so.
        """
        job = f"{name}-{number}"
        with self._plainly():
            try:
                self._client.submit_job(entrypoint=entrypoint, submission_id=job, **given)
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                raise ConfigError(
                    f"{job} was submitted by somebody else at this moment; follow it with "
                    f"'offsite-ray submit status --name {name} --follow'"
                ) from error
        return job

    def stop(self, job: str) -> None:
        """Ask a job to end."""
        with self._plainly():
            self._client.stop_job(job)

    def log(self, job: str) -> AsyncIterator[str]:
        """Return a job's log from its beginning, as it grows."""
        return self._client.tail_job_logs(job)

    @contextlib.contextmanager
    def _plainly(self) -> Iterator[None]:
        """Say in a line what is wrong with an answer."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise ConfigError(
                f"{self.address} refuses the token: {first_line(error)}; set RAY_AUTH_MODE=token, "
                "and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to that of the cluster"
            ) from error
        except OSError as error:
            raise ClusterError(
                f"no job server answers at {self.address}: {first_line(error)}; is the cluster up, "
                "and is that the address of its dashboard, with its port (8265)?"
            ) from error
        except (RuntimeError, ValueError) as error:
            raise ClusterError(f"{self.address} did not do it: {_reason(error)}") from error


@contextlib.contextmanager
def _address_alone(address: str) -> Iterator[None]:
    """Keep Ray's client from an address of the environment; ``RAY_ADDRESS`` is of a driver."""
    before = os.environ.get(ADDRESS)
    os.environ[ADDRESS] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADDRESS]
        else:
            os.environ[ADDRESS] = before


def _job(details: Any) -> Job | None:
    """Return what is known of a job; None for one whose id is no name and number."""
    match = _JOB.fullmatch(details.submission_id or "")
    if match is None:
        return None
    told: Mapping[str, str] = details.metadata or {}
    status = str(details.status)
    started = (details.start_time or 0) / 1000
    ended = details.end_time / 1000 if details.end_time else time.time()
    return Job(
        name=match[1],
        job=details.submission_id,
        status=status,
        exit_status=_exit_status(status, details.driver_exit_code),
        verb=told.get("offsite_ray_verb"),
        started=datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat("T", "seconds"),
        seconds=round(max(0.0, ended - started), 1),
        node=details.driver_node_id,
        message=_said(details.message or "", by_driver=details.driver_exit_code is not None),
        digest=told.get("offsite_ray_digest"),
    )


def _exit_status(status: str, code: int | None) -> int | None:
    """Return an exit status as a shell has it: 128 and more for a signal."""
    if status != "FAILED" or not code:
        return {"SUCCEEDED": 0, "FAILED": 1}.get(status)
    return code if code > 0 else 128 - code


def _said(message: str, *, by_driver: bool) -> str:
    """Return the line that says most: of a driver's log the last, of Ray's words the first."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or [""]
    return lines[-1 if by_driver else 0][:500]


def _reason(error: Exception) -> str:
    """Return the last line of an answer that says something; it is often a traceback."""
    lines = [line for line in str(error).splitlines() if any(map(str.isalnum, line))]
    return (lines or [type(error).__name__])[-1][:500].rstrip(". ")
