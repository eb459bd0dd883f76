# SPDX-License-Identifier: Apache-2.0
"""Models that are larger than memory: what is read, what is written, and what is held meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints import write_checkpoint, write_random_adapter
from offsite_ray.bundle import (
    TensorDirectory,
    all_finite,
    alone,
    atomic_directory,
    digests,
    specs,
    write_file,
)
from offsite_ray.bundle.windows import windows
from offsite_ray.config import VerifyConfig
from offsite_ray.emulator import open_bundle
from offsite_ray.errors import StorageError
from offsite_ray.inspection import verify
from tests.adapters import make_adapter
from tests.checkpoints import small_opt
from tests.conftest import ROOT
from tests.damage import join_safetensors, split_safetensors
from tests.disks import no_file_larger_than
from tests.stock import CUT, cut, plug, same_bytes, stored
from tests.tiny_models import save_tiny

MIB = 2**20


def run(code: str, *words: str) -> str:
    """Run Python in a process of its own; return the last line of its stderr."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr.rstrip().rpartition("\n")[2]


# What is held

PEAK = """
import json, re, sys
from offsite_ray.cli import main

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

grown = {}
for line in sys.argv[1:]:
    large = line.split()
    assert main([word.replace("large/", "small/") for word in large]) == 0
    # All is imported now, and every thread started; the peak is forgotten.
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    assert main(large) == 0
    grown[large[0] + " " + large[-1]] = memory("VmHWM") - before
print(json.dumps(grown), file=sys.stderr)
"""


@pytest.mark.slow
def test_no_verb_holds_more_than_a_few_windows(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as root:  # not kept: a model of 600 MB
        for name, width in (("small", 64), ("large", 1024)):
            folder = Path(root) / name
            write_checkpoint(small_opt(24, width, shard_bytes=10**8), folder / "model")
            cut(folder / "model", "8-4-8", folder / "made")
            write_random_adapter(folder / "made", folder / "full")
            make_adapter(folder / "made", folder / "lora", method="lora", noise=0.01)
        assert (folder / "full/adapter.safetensors").stat().st_size > 400 * 10**6
        model = f"--model {folder}/model"
        lines = [
            f"compress {model} --plan 8-4-8 --out {folder}/bundle",
            f"verify {model} {folder}/bundle",
            f"verify {model} {folder}/full",
            f"plug-in {model} --adapter {folder}/full --out {folder}/plugged",
            f"plug-in {model} --adapter {folder}/lora --out {folder}/merged",
            f"verify {folder}/plugged",
        ]
        grown = json.loads(run(PEAK, *lines))
    assert len(grown) == len(lines)
    assert {what: size // MIB for what, size in grown.items() if size > 200 * MIB} == {}


# What is read


def test_a_dropped_block_is_not_read(tmp_path: Path) -> None:
    """It has 2**40 bytes, all of them a hole in its file, and reading them takes minutes of CPU."""
    model = save_tiny("opt", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.decoder.layers.2.fc1.weight"
    del tensors[name]
    save_file(tensors, model / "a.safetensors", metadata={"format": "pt"})
    entry = {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [0, 2**40]}
    huge = model / "b.safetensors"
    join_safetensors(huge, json.dumps({name: entry}).encode(), b"")
    os.truncate(huge, huge.stat().st_size + 2**40)
    (model / "model.safetensors").unlink()
    index = {"weight_map": {**dict.fromkeys(tensors, "a.safetensors"), name: "b.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    code = (
        "import resource, shlex, sys; resource.setrlimit(resource.RLIMIT_CPU, (60, 60));"
        "from offsite_ray.cli import main; [main(shlex.split(line)) and sys.exit(1) for line in"
        " sys.argv[1:]]"
    )
    out = tmp_path / "bundle"
    run(
        code,
        f"compress --model {model} --plan '{CUT}' --out {out}",
        f"verify {out} --model {model}",
        f"inspect {model}",
    )
    measured = json.loads((out / "offsite.json").read_text("utf-8"))["measured"]
    assert measured["full_model_bytes"] > 2**40
    kept = sum(tensor.nbytes for key, tensor in tensors.items() if ".layers.2." not in key)
    assert measured["bundle_bytes"] == kept


@pytest.mark.parametrize("size", [4096, 12_288, 100_000, 2**20])
@pytest.mark.parametrize("begin", [0, 1, 4096, 4104, 99_999])
def test_windows_give_every_byte_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, begin: int
) -> None:
    monkeypatch.setattr("offsite_ray.bundle.windows.WINDOW_BYTES", size)
    data = random.Random(0).randbytes(100_001)
    (tmp_path / "file").write_bytes(data)
    for end in (begin, begin + 1, 99_999, 100_001):
        with (tmp_path / "file").open("rb") as file:
            pieces = [bytes(piece) for piece in windows(file, begin, end)]
        assert b"".join(pieces) == data[begin:end]
        assert all(len(piece) <= size for piece in pieces)


@pytest.mark.parametrize("window", [4096, 2**25])
def test_digests_of_tensors_and_files_in_one_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr("offsite_ray.bundle.windows.WINDOW_BYTES", window)
    model = save_tiny("opt", tmp_path / "model", max_shard_size=20_000)
    weights = TensorDirectory.of_model(model)
    names = [name for name in weights.tensors if ".1." in name]
    files = list(weights.files)[::2]
    of_tensors, of_files = digests(weights, names, files)
    every = stored(model)
    assert of_tensors == {n: blake3(every[n].numpy().tobytes()).hexdigest() for n in names}
    assert of_files == {file: blake3(file.read_bytes()).hexdigest() for file in files}


# What is written


def written_by_this_process() -> int:
    """Return the bytes that this process has given to ``write``, by the kernel's count."""
    lines = Path("/proc/self/io").read_text("utf-8").splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


@pytest.mark.parametrize("plan", ["1-4-1", "2-3-0", "adapter=5 emulator=0,9"])
def test_plug_in_writes_the_shards_that_change_and_links_the_rest(
    tmp_path: Path, plan: str
) -> None:
    model = tmp_path / "model"
    write_checkpoint(small_opt(12, 128, shard_bytes=500_000), model)
    write_random_adapter(cut(model, plan, tmp_path / "bundle"), tmp_path / "adapter")
    adapter = load_file(tmp_path / "adapter/adapter.safetensors")
    before = written_by_this_process()
    plug(model, tmp_path / "adapter", tmp_path / "out")
    num_written = written_by_this_process() - before
    index = json.loads((model / "model.safetensors.index.json").read_text("utf-8"))
    changed = {index["weight_map"][name] for name in adapter}
    shards = sorted(file.name for file in model.glob("*.safetensors"))
    assert 0 < len(changed) < len(shards)
    for name in shards:
        ours, theirs = tmp_path / "out" / name, model / name
        assert ours.samefile(theirs) is (name not in changed)
        assert ours.stat().st_nlink == (1 if name in changed else 2)
    due = sum((model / name).stat().st_size for name in changed)
    beside = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.json"))
    assert due <= num_written <= due + beside
    assert same_bytes(stored(tmp_path / "out"), {**stored(model), **adapter})
    verify(VerifyConfig(path=str(tmp_path / "out"), model=None))


def test_the_windows_do_not_show_in_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("opt", tmp_path / "model", max_shard_size=20_000)
    files = []
    for window in (2**25, 4096):
        for module in ("windows", "digest"):
            monkeypatch.setattr(f"offsite_ray.bundle.{module}.WINDOW_BYTES", window)
        monkeypatch.setattr("offsite_ray.bundle.digest._SMALL_BYTES", window // 32)
        monkeypatch.setattr("offsite_ray.bundle.digest._WRITE_BYTES", window // 128)
        bundle = cut(model, CUT, tmp_path / f"bundle-{window}")
        files.append(open_bundle(bundle).manifest.files)
        for name, digest in files[-1].items():
            assert blake3((bundle / name).read_bytes()).hexdigest() == digest
    assert files[0] == files[1]


def test_what_the_disk_does_not_take_is_said(tmp_path: Path) -> None:
    """The thread that writes meets the error, and the one that asked for it must hear of it."""
    for size in (2 * MIB, 40 * MIB, 70 * MIB):
        with no_file_larger_than(size), pytest.raises(OSError, match="too large"):
            write_file(tmp_path / f"{size}", specs({"x": torch.zeros(24 * MIB)}))
    with (
        no_file_larger_than(2 * MIB),
        pytest.raises(StorageError, match="too large"),
        atomic_directory(tmp_path / "out") as tmp,
    ):
        write_file(tmp / "x.safetensors", specs({"x": torch.zeros(MIB)}))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        str(size) for size in (2 * MIB, 40 * MIB, 70 * MIB)
    )


# What is computed without a copy


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
@pytest.mark.parametrize("size", [1, 2, 7, 16, 33, 1000])
def test_a_value_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, size: int) -> None:
    good = torch.linspace(-3, 3, size).to(dtype)
    assert all_finite(good)
    assert all_finite(good[:0])
    values = [float("nan")]
    values += [] if dtype == torch.float8_e4m3fn else [float("inf"), float("-inf")]
    for value in values:
        for place in range(size):
            bad = good.clone()
            bad[place] = value
            assert not all_finite(bad)


def test_a_view_is_the_tensor_whatever_its_place(tmp_path: Path) -> None:
    model = save_tiny("opt", tmp_path / "model", dtype=torch.bfloat16)
    file = model / "model.safetensors"
    expected = {name: tensor.clone() for name, tensor in stored(model).items()}
    header, data = split_safetensors(file)
    for padding in range(4):
        join_safetensors(file, header + b" " * padding, data)
        weights = TensorDirectory.of_model(model)
        assert same_bytes({n: weights.view(n) for n in weights.tensors}, expected)
        assert same_bytes({n: weights.read(n) for n in weights.tensors}, expected)
    weights.view(min(expected)).fill_(0)  # in memory
    assert same_bytes(stored(model), expected)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "opt"])
def test_lora_is_merged_alike_one_by_one_and_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = save_tiny(family, tmp_path / "model", dtype=torch.bfloat16)
    make_adapter(
        cut(model, CUT, tmp_path / "bundle"), tmp_path / "adapter", method="lora", noise=0.1
    )
    alone = plug(model, tmp_path / "adapter", tmp_path / "alone")
    monkeypatch.setattr("offsite_ray.finetuning.lora.stored_alone", lambda *_: {})
    by_block = plug(model, tmp_path / "adapter", tmp_path / "by-block")
    assert alone.replaced == by_block.replaced != ()
    assert same_bytes(stored(tmp_path / "alone"), stored(tmp_path / "by-block"))


# Places


@pytest.mark.parametrize("kind", ["link", "here", "volume"])
def test_a_place_that_no_directory_can_take_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    monkeypatch.chdir(tmp_path / "folder")
    out = {"link": tmp_path / "link", "here": Path(), "volume": Path("/proc")}[kind]
    with pytest.raises(StorageError, match="give a new name inside it"), atomic_directory(out):
        pytest.fail("begun")


KILLED = """
import os, signal, sys
from pathlib import Path
from offsite_ray.bundle import atomic_directory
with atomic_directory(Path(sys.argv[1])) as tmp:
    (tmp / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_and_what_another_writes_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False, env=environ)
    assert killed.returncode == -9
    assert [path.name.startswith(".out.tmp-") for path in tmp_path.iterdir()] == [True]
    with atomic_directory(out) as other:
        (left,) = tmp_path.iterdir()
        assert left == other
        with contextlib.ExitStack() as late:
            (late.enter_context(atomic_directory(out)) / "file").write_text("late")
            assert len(list(tmp_path.iterdir())) == 2
            out.mkdir()
            (out / "file").write_text("first")
            with pytest.raises(StorageError, match="exists and is not empty"):
                late.close()
        assert other.is_dir()
        shutil.rmtree(out)
    assert list(tmp_path.iterdir()) == [out]


def test_a_lock_that_cannot_be_made_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lock = tmp_path / "file" / ".lock"
    with pytest.raises(StorageError, match=r"file: File exists$"), alone(lock):
        pytest.fail("begun")
