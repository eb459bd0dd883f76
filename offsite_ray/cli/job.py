# SPDX-License-Identifier: Apache-2.0
"""Where a job begins that ``offsite-ray submit`` has sent: ``python -m offsite_ray.cli.job``.

It begins in the folder that was packed, and then runs the verb in the folder of its files.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from offsite_ray.cli import main
from offsite_ray.cli.arguments import parse
from offsite_ray.cli.verbs import VERBS
from offsite_ray.errors import ConfigError, OffsiteError
from offsite_ray.runs import made_before
from offsite_ray.storage import is_published
from offsite_ray.submit import RECIPE, REQUIREMENTS, check_installed
from offsite_ray.uris import is_uri

if TYPE_CHECKING:
    from offsite_ray.cli.arguments import Request


def run_job(root: str, verb: str, *words: str) -> int:
    """Run a verb with the recipe of this folder; return the exit status.

    Args:
        root: Folder that the recipe's paths are below.
        verb: What to run.
        *words: What stands behind it.
    """
    recipe, requirements = Path(RECIPE).resolve(), Path(REQUIREMENTS)
    try:
        if requirements.is_file():
            check_installed(requirements)
        try:
            os.chdir(root)
        except OSError as error:
            raise ConfigError(
                f"--root {root}: {error.strerror} on the node of this job; it must be a folder "
                "that every node sees"
            ) from error
        asked = parse(VERBS[verb], ["--config", str(recipe), *words], VERBS)
        if _is_done(asked, verb):
            print(f"offsite-ray: the run {asked.run!r} has done this already", file=sys.stderr)
            return 0
    except OffsiteError as error:
        print(f"offsite-ray: error: {error}", file=sys.stderr)
        return error.exit_status
    return main([verb, "--config", str(recipe), *words])


def _is_done(request: Request, verb: str) -> bool:
    """Return whether the run has done this already, perhaps on a cluster that is no more."""
    if request.run is None or request.runs is None:
        return False
    made = made_before(request.runs, request.run, verb, request.config)
    there = (is_published(path) if is_uri(path) else os.path.exists(path) for path in made)
    return bool(made) and all(there)


if __name__ == "__main__":
    sys.exit(run_job(*sys.argv[1:]))
