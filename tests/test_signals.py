# SPDX-License-Identifier: Apache-2.0
"""What uses Ray and is told to end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loops import Loop

TIDIES_UP = """
import time
from offsite_ray.cluster import embedded_ray

with embedded_ray(0):
    print("connected", flush=True)
    try:
        while True:
            time.sleep(0.1)  # a signal that comes just before a sleep does not end it
    finally:
        time.sleep(5)  # longer than the three seconds after which Ray would abort
        print("tidy", flush=True)
"""


def test_who_is_told_to_end_may_tidy_up_for_long() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TIDIES_UP], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
        process.terminate()
        assert process.communicate(timeout=120)[0] == "tidy\n"
    assert process.returncode == 128 + signal.SIGTERM


def test_ctrl_c_ends_a_training_on_ray_as_any_other(loop: Loop, tmp_path: Path) -> None:
    words = [
        f"--bundle={loop.bundle}", f"--data={loop.text}", f"--out={tmp_path}/adapter",
        "--max-steps=100000", "--batch-size=2", "--seq-len=16", "--num-workers=1",
        "--run=stopped", f"--runs={tmp_path}/runs",
    ]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "offsite_ray", "finetune", *words],
        stderr=subprocess.PIPE, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        while "step 0/" not in (line := process.stderr.readline()):
            assert line, "it ended by itself"
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[1]
    assert (process.returncode, said.splitlines()[-1]) == (130, "offsite-ray: interrupted")
    record = json.loads((tmp_path / "runs/stopped/run.json").read_text())
    assert (record["status"], record["exit_status"]) == ("stopped", 130)
    assert not (tmp_path / "adapter").exists()
