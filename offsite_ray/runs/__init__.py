# SPDX-License-Identifier: Apache-2.0
"""Runs by name: a directory each that says what was asked, what became of it, what it took."""

from offsite_ray.runs.record import (
    LOG,
    METRICS,
    RECIPE,
    RECORD,
    RESULT,
    Attempt,
    RunRecord,
    list_runs,
    read_run,
    run_directory,
)
from offsite_ray.runs.recording import Recorder, exit_status_of, made_before, recorded

__all__ = [
    "LOG",
    "METRICS",
    "RECIPE",
    "RECORD",
    "RESULT",
    "Attempt",
    "Recorder",
    "RunRecord",
    "exit_status_of",
    "list_runs",
    "made_before",
    "read_run",
    "recorded",
    "run_directory",
]
