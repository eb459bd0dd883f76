# SPDX-License-Identifier: Apache-2.0
"""The log of a run: a JSON object a line, with the run's name in each."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import sys
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import first_line
from offsite_ray.uris import scrubbed, without_secrets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PACKAGE = "offsite_ray"
"""The logger that every module's is below."""


class JsonLines(logging.FileHandler):
    """Appends records to a file, as JSON."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """Open the file.

        Args:
            path: The file.
            facts: What every line says.
        """
        super().__init__(path, encoding="utf-8")
        self._facts, self._failed = facts, False

    def format(self, record: logging.LogRecord) -> str:
        """Return a line."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        said = {
            "time": time.isoformat(timespec="milliseconds"),
            **self._facts,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if trace := getattr(record, "traceback", None):
            said["traceback"] = trace
        return json.dumps(without_secrets(said, scrubbed))

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once that the log cannot be written; the run goes on."""
        if not self._failed:
            self._failed = True
            why = first_line(sys.exc_info()[1] or Exception())
            print(f"{self.baseFilename} cannot be written: {why}", file=sys.stderr)


@contextlib.contextmanager
def logging_to(path: Path, **facts: Any) -> Iterator[None]:
    """Log to a file what this package logs until the block ends, notices among it."""
    logger = logging.getLogger(PACKAGE)
    handlers: list[logging.Handler] = [JsonLines(path, facts)]
    if not logger.hasHandlers() and logging.lastResort is not None:
        handlers.append(logging.lastResort)  # to stderr; only in use where there is no other
    level = logger.level
    logger.setLevel(logging.INFO)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
        handlers[0].close()
