# SPDX-License-Identifier: Apache-2.0
"""``python -m offsite_ray`` is ``offsite-ray``."""

from __future__ import annotations

import sys

from offsite_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
