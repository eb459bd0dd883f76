# SPDX-License-Identifier: Apache-2.0
"""Sweep on a Ray cluster, as a job: ``offsite-ray sweep``, with the same words behind it.

ray job submit --address http://HEAD:8265 --working-dir . -- \
    python jobs/sweep.py --config FILE --out DIR

Model, texts and DIR must be seen by every node. Submitted again, it goes on with what is left.
"""

from __future__ import annotations

import sys

from offsite_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "sweep")
    sys.exit(main())
