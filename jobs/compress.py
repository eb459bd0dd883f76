# SPDX-License-Identifier: Apache-2.0
r"""Compress on a Ray cluster, as a job: ``offsite-ray compress``, with the same words behind it.

ray job submit --address http://HEAD:8265 --working-dir . -- \
    python jobs/compress.py --config FILE --out BUNDLE

The model and BUNDLE must be seen by every node.
"""

from __future__ import annotations

import sys

from offsite_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "compress")
    sys.exit(main())
