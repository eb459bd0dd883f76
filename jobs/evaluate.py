# SPDX-License-Identifier: Apache-2.0
r"""Evaluate on a Ray cluster, as a job: ``offsite-ray evaluate``, with the same words behind it.

ray job submit --address http://HEAD:8265 --working-dir . -- \
    python jobs/evaluate.py --config FILE --out FILE

What it reads and writes must be seen by every node.
"""

from __future__ import annotations

import sys

from offsite_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    sys.exit(main())
