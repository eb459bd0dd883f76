# SPDX-License-Identifier: Apache-2.0
"""Prepare text on a Ray cluster, as a job: ``offsite-ray prepare``, with the same words behind it.

ray job submit --address http://HEAD:8265 --working-dir . -- \
    python jobs/prepare.py --config FILE num_workers=16

The sources and the target must be seen by every node: on shared storage, or by URI (s3://, gs://).
"""

from __future__ import annotations

import sys

from offsite_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "prepare")
    sys.exit(main())
