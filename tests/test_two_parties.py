# SPDX-License-Identifier: Apache-2.0
"""Both parties, each with a process and a folder of its own; and a process that is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offsite_ray.bundle import TensorDirectory

if TYPE_CHECKING:
    from tests.loops import Loop

ROOT = Path(__file__).resolve().parents[1]

WATCHED = """
import json, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from offsite_ray.cli import main
status = main(sys.argv[2:])
with open(sys.argv[1], "w") as log:
    json.dump(opened, log)
sys.exit(status)
"""


def run(arguments: list[str], cwd: Path, program: list[str] | None = None) -> subprocess.Popen[str]:
    """Start the command line in a folder."""
    return subprocess.Popen(
        [sys.executable, *(program or ["-m", "offsite_ray"]), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a command that must succeed; return its stdout."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


FINETUNE = [
    "finetune",
    "--bundle",
    "bundle",
    "--data",
    "private.jsonl",
    "--out",
    "adapter",
    "--max-steps",
    "6",
    "--batch-size",
    "4",
    "--seq-len",
    "32",
    "--learning-rate",
    "5e-3",
]


@pytest.fixture
def data_owner(loop: Loop, tmp_path: Path) -> Path:
    """Return a folder with the bundle and the private text, and nothing else."""
    folder = tmp_path / "data-owner"
    folder.mkdir()
    shutil.copytree(loop.bundle, folder / "bundle")
    shutil.copy(loop.rows, folder / "private.jsonl")
    return folder


def test_the_data_owner_opens_no_file_of_the_full_model(
    loop: Loop, data_owner: Path, tmp_path: Path
) -> None:
    log = tmp_path / "opened.json"
    finish(run([str(log), *FINETUNE], data_owner, ["-c", WATCHED]))
    opened = json.loads(log.read_text())
    resolved = {str((data_owner / name).resolve()) for name in opened}
    assert str(data_owner / "bundle/model.safetensors") in resolved
    assert [name for name in resolved if name.startswith(str(loop.root))] == []
    assert sorted(p.name for p in data_owner.iterdir()) == ["adapter", "bundle", "private.jsonl"]


def test_what_goes_over_is_only_what_is_due(loop: Loop, data_owner: Path, tmp_path: Path) -> None:
    finish(run([*FINETUNE, "--json"], data_owner))
    owner = tmp_path / "owner"
    owner.mkdir()
    shutil.copytree(loop.model, owner / "model")
    shutil.copytree(data_owner / "adapter", owner / "adapter")
    plug_in = ["plug-in", "--model", "model", "--adapter", "adapter", "--out", "plugged", "--json"]
    result = json.loads(finish(run(plug_in, owner)))
    before = TensorDirectory.of_model(owner / "model")
    after = TensorDirectory.of_model(owner / "plugged")
    changed = {n for n in before.tensors if bytes(before.data(n)) != bytes(after.data(n))}
    assert changed == set(result["replaced"])
    assert {name.split(".h.")[1].split(".")[0] for name in changed} == {"0", "5"}
    private = (data_owner / "private.jsonl").read_text()
    sentence = json.loads(private.splitlines()[0])["text"][:30].encode()
    for file in (data_owner / "adapter").iterdir():
        assert sentence not in file.read_bytes()


def test_killed_at_any_moment_and_resumed(data_owner: Path) -> None:
    straight = [*FINETUNE, "--checkpoint-every", "1"]
    finish(run([*straight, "--out", "straight"], data_owner))
    process = run(straight, data_owner)
    run_dir = data_owner / ".adapter.run"
    deadline = time.monotonic() + 120
    while not list(run_dir.glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (data_owner / "adapter").exists()
    refused = run(straight, data_owner)
    assert "--resume" in refused.communicate()[1]
    assert refused.returncode == 2
    finish(run([*straight, "--resume"], data_owner))
    name = "adapter.safetensors"
    assert (data_owner / "adapter" / name).read_bytes() == (
        data_owner / "straight" / name
    ).read_bytes()
    assert not run_dir.exists()


def test_two_writers_of_one_name(loop: Loop, tmp_path: Path) -> None:
    arguments = ["compress", "--model", str(loop.model), "--plan", "1-2-1", "--out", "bundle"]
    writers = [run(arguments, tmp_path) for _ in range(2)]
    ended = [(w.communicate(timeout=120)[1], w.returncode) for w in writers]
    assert 0 in [status for _, status in ended]
    assert {status for _, status in ended} <= {0, 2}
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    finish(run(["verify", "bundle", "--model", str(loop.model)], tmp_path))
