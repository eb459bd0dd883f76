# SPDX-License-Identifier: Apache-2.0
"""Run drills, and write what they found.

    python -m cluster.drills                  all of them: what docs/drills.md shows
    python -m cluster.drills --only serve     those with a word in their name; the other rows stay

Each has a cluster of its own. One that cannot be run on this machine says why. Exit status 1 where
something was lost, or a drill did not come to an end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import ROOT, commit, machine
from benchmarks.page import put
from cluster.drills import disks
from cluster.drills.lab import running_lab
from cluster.drills.network import why_not
from cluster.drills.page import BEGIN, tables
from cluster.drills.table import DRILLS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cluster.drills.table import Drill

RESULTS = ROOT / "benchmarks" / "results" / "drills.json"
PAGE = ROOT / "docs" / "drills.md"
_PACKAGES = ("offsite-ray", "ray", "torch", "deepspeed")


def main(words: Sequence[str] | None = None) -> int:
    """Run drills one after the other."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="drills with it in their name")
    given = parser.parse_args(words)
    chosen = [drill for drill in DRILLS if given.only in drill.name]
    if not chosen:
        parser.error(
            f"no drill has {given.only!r} in its name: {', '.join(d.name for d in DRILLS)}"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it cleans up, as after Ctrl-C
    # What trains is small, and all nodes share the cores of this machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Short: sockets of nodes with a disk of their own are below it.
    with tempfile.TemporaryDirectory(prefix="dr", ignore_cleanup_errors=True) as folder:
        passed = [write(run(drill, Path(folder))) for drill in chosen]
    return int(not all(passed))


def write(found: dict[str, Any]) -> bool:
    """Put what a drill found in the place of what it found before; return whether it passed."""
    known = json.loads(RESULTS.read_text("utf-8"))["drills"] if RESULTS.exists() else []
    by_name = {one["name"]: one for one in (*known, found)}
    result = {
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in _PACKAGES}},
        "network": why_not() or "network namespaces, a bridge and veth pairs",
        "drills": [by_name[drill.name] for drill in DRILLS if drill.name in by_name],
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    put(PAGE, BEGIN, tables(result))
    return not (found["failed"] or found["lost"])


def run(drill: Drill, folder: Path) -> dict[str, Any]:
    """Run a drill on a cluster of its own; return what it found, or why it found nothing."""
    found: dict[str, Any] = {
        "name": drill.name, "date": datetime.now(UTC).date().isoformat(), "commit": commit(),
        "load_before": os.getloadavg()[0], "done": drill.done, "whole": drill.whole,
        "not_run": None, "failed": None, "lost": None, "cost": None, "whole_after_s": None,
        "numbers": {},
    }  # fmt: skip
    reason = drill.why_not() or (why_not() if drill.plan.needs_network else None)
    began = time.monotonic()
    if reason:
        found["not_run"] = reason
    else:
        try:
            with (
                _own_disk(drill, folder) as scratch,
                running_lab(drill.plan, folder, scratch) as lab,
            ):
                found |= asdict(drill.run(lab))
        except Exception as error:
            traceback.print_exc()
            found["failed"] = f"{type(error).__name__}: {error}"
    found["seconds"] = time.monotonic() - began
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


@contextlib.contextmanager
def _own_disk(drill: Drill, folder: Path) -> Iterator[Path | None]:
    """Give the first worker a disk of its own for Ray's files, where the drill wants one."""
    if drill.small_node_bytes is None:
        yield None
        return
    with disks.disk(folder / "node.img", drill.small_node_bytes) as path:
        yield path


if __name__ == "__main__":
    sys.exit(main())
