# SPDX-License-Identifier: Apache-2.0
r"""Plug in on a Ray cluster, as a job: ``offsite-ray plug-in``, with the same words behind it.

ray job submit --address http://HEAD:8265 --working-dir . -- \
    python jobs/plug_in.py --config FILE --out DIR

The model, the adapter and DIR must be seen by every node.
"""

from __future__ import annotations

import sys

from offsite_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "plug-in")
    sys.exit(main())
