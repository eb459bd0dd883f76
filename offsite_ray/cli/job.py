# SPDX-License-Identifier: Apache-2.0
"""Where a job begins that ``offsite-ray submit`` has sent: ``python -m offsite_ray.cli.job``.

It begins in the folder that was packed, and then runs the verb in the folder of its files.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from offsite_ray.cli import main
from offsite_ray.errors import ConfigError, OffsiteError
from offsite_ray.submit import RECIPE, REQUIREMENTS, check_installed


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
    except OffsiteError as error:
        print(f"offsite-ray: error: {error}", file=sys.stderr)
        return error.exit_status
    return main([verb, "--config", str(recipe), *words])


if __name__ == "__main__":
    sys.exit(run_job(*sys.argv[1:]))
