# SPDX-License-Identifier: Apache-2.0
"""Measure compress, plug-in and verify of models that need not fit into memory, beside cp.

    python benchmarks/outofcore.py                              writes what docs/benchmarks.md shows
    python benchmarks/outofcore.py --shape tiny --results runs  a minute; only shows that it runs

Checkpoints of the exact shape of OPT-6.7B, BLOOM-7.1B and Llama-2-7B, in bf16 and with random
weights, are written into a folder once and kept there. What runs is the command line, in processes
of its own; what is copied beside it is the very files that it wrote, on the same disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A script's own folder is all that Python would look in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoints import CHECKPOINTS, Checkpoint
from benchmarks.machine import ROOT, commit, machine
from benchmarks.outofcore_page import BEGIN, tables
from benchmarks.page import put
from benchmarks.processes import Ran, cache, imports_of, ran, uncache, verb
from offsite_ray.results import to_plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
CACHE = ROOT / "benchmarks" / "cache"

_DEFAULT_SHAPES = ("opt-6.7b", "bloom-7.1b", "llama-2-7b")

_REMEMBERED = "remembered"
"""Folder for the digests that verbs keep."""

_PACKAGES = ("torch", "transformers", "safetensors", "blake3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One run of a verb, and what is beside it."""

    verb: Ran
    kilobytes: Ran
    """The same verb on a model of kilobytes: the interpreter, the imports and little else."""
    copy_seconds: float | None
    """``cp`` of the files that the verb wrote; None where it wrote none."""
    sync_seconds: float | None
    """``sync`` of the copy, after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A verb on a model."""

    name: str
    imports: Ran
    """An interpreter that imports the same and does nothing else."""
    given_bytes: int
    """Of the files in the directories that it was given."""
    written_bytes: int
    """Of the files that it wrote; what it linked is not among them."""
    written_shards_bytes: int
    """Of those with weights."""
    due_shards_bytes: int | None
    """Of the model's files with a tensor of the adapter; None where the verb is not plug-in."""
    rounds: tuple[Round, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A model, and the verbs on it."""

    shape: Checkpoint
    model_bytes: int
    rows: tuple[Row, ...]
    num_rounds: int
    date: str
    """ISO 8601, UTC."""
    commit: str | None
    """Of the working tree; None outside git."""
    machine: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A verb, with the names of what it is given and writes in a folder."""

    title: str
    words: tuple[str, ...]
    """Those that name a directory in the folder are replaced by its path."""
    out: str | None = None
    again: bool = False
    """Whether it may know digests of the model from the verb before."""

    def command(self, folder: Path) -> list[str]:
        """Return the words for what is in that folder."""
        words = [str(folder / word) if (folder / word).is_dir() else word for word in self.words]
        return words if self.out is None else [*words, "--out", str(folder / self.out)]

    def inputs(self, folder: Path) -> list[Path]:
        """Return the files that it is given there."""
        directories = [folder / word for word in self.words if (folder / word).is_dir()]
        return [file for directory in directories for file in _files(directory)]

    def clear(self, folder: Path) -> None:
        """Remove what it wrote there."""
        if self.out is not None:
            shutil.rmtree(folder / self.out, ignore_errors=True)

    def written(self, folder: Path) -> list[Path]:
        """Return the files that it wrote there; one that is linked has another name elsewhere."""
        files = [] if self.out is None else _files(folder / self.out)
        return [file for file in files if file.stat().st_nlink == 1]


def tasks(shape: Checkpoint) -> tuple[Task, ...]:
    """Return what is measured of a model, in order: each finds what those before it wrote."""
    model = ("--model", "model")
    compress = ("compress", *model, "--plan", shape.plan)
    plug_in = ("plug-in", *model, "--adapter", "adapter")
    return (
        Task(title="compress", words=compress, out="bundle"),
        Task(title="verify a bundle", words=("verify", "bundle", *model)),
        Task(title="verify an adapter", words=("verify", "adapter", *model)),
        Task(title="plug-in", words=plug_in, out="plugged-in"),
        Task(title="plug-in again", words=plug_in, out="plugged-in", again=True),
        Task(title="verify a plugged-in model", words=("verify", "plugged-in")),
    )


def measure(shape: Checkpoint, folder: Path, num_rounds: int) -> Measured:
    """Run every verb on a model in a folder, which is written there if it is not; keep only it."""
    _clear(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / _REMEMBERED)
    if not (folder / "model").is_dir():
        _say(f"{shape.name}: writing {folder / 'model'}")
        _make("model", shape.name, folder / "model")
    uncache(_files(folder / "model"))
    _make("tiny", shape.name, folder / "tiny" / "model")
    compress, *others = tasks(shape)
    try:
        rows = [measured(compress, folder, num_rounds)]
        for place in (folder, folder / "tiny"):
            _make("adapter", str(place / "bundle"), place / "adapter")
        rows += [measured(task, folder, num_rounds) for task in others]
    finally:
        _clear(folder)
    return Measured(
        shape=shape,
        model_bytes=_size(_files(folder / "model")),
        rows=tuple(rows),
        num_rounds=num_rounds,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        machine=machine(),
        versions={"python": platform.python_version(), **{n: version(n) for n in _PACKAGES}},
    )


def measured(task: Task, folder: Path, num_rounds: int) -> Row:
    """Measure a verb; what it wrote last stays."""
    tiny = folder / "tiny"
    task.clear(tiny)
    imports = imports_of(*task.command(tiny))
    rounds = []
    for number in range(1, num_rounds + 1):
        rounds.append(_round(task, folder))
        took = rounds[-1]
        _say(
            f"{folder.name}, {task.title}, round {number} of {num_rounds}: {took.verb.seconds:.1f} "
            f"s, on kilobytes {took.kilobytes.seconds:.1f} s; cp {took.copy_seconds or 0:.1f} s, "
            f"sync {took.sync_seconds or 0:.1f} s"
        )
    written = task.written(folder)
    shards = [file for file in written if file.suffix == ".safetensors"]
    return Row(
        name=task.title,
        imports=imports,
        given_bytes=_size(task.inputs(folder)),
        written_bytes=_size(written),
        written_shards_bytes=_size(shards),
        due_shards_bytes=_due(folder) if "plug-in" in task.words else None,
        rounds=tuple(rounds),
    )


def _round(task: Task, folder: Path) -> Round:
    """Run a verb, and then cp of what it wrote; both find what they read in the page cache."""
    tiny = folder / "tiny"
    task.clear(tiny)
    task.clear(folder)
    if not task.again:
        shutil.rmtree(folder / _REMEMBERED, ignore_errors=True)
    kilobytes = ran(verb(*task.command(tiny)))
    inputs = task.inputs(folder)
    cache(inputs)
    took = ran(verb(*task.command(folder)))
    uncache(inputs)
    copy_seconds, sync_seconds = None, None
    if written := task.written(folder):
        cache(written)
        copy = folder / "copy"
        copy.mkdir()
        copy_seconds = ran(["cp", "--reflink=never", *map(str, written), str(copy)]).seconds
        sync_seconds = ran(["sync", *map(str, _files(copy))]).seconds
        shutil.rmtree(copy)
        uncache(written)
    return Round(
        verb=took, kilobytes=kilobytes, copy_seconds=copy_seconds, sync_seconds=sync_seconds
    )


def _due(folder: Path) -> int:
    """Return the bytes of the model's files that hold a tensor of the adapter."""
    with (folder / "adapter" / "adapter.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    index = json.loads((folder / "model" / "model.safetensors.index.json").read_text("utf-8"))
    names = {index["weight_map"][name] for name in header if name != "__metadata__"}
    return _size(folder / "model" / name for name in names)


def _make(what: str, source: str, target: Path) -> None:
    """Write something in a process of its own: what imports torch here would count below."""
    command = [sys.executable, "-m", "benchmarks.checkpoints", what, source, str(target)]
    ran(command)
    uncache(_files(target))


def _clear(folder: Path) -> None:
    for name in ("bundle", "adapter", "plugged-in", "copy", "tiny", _REMEMBERED):
        shutil.rmtree(folder / name, ignore_errors=True)


def _files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.iterdir() if file.is_file())


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", choices=CHECKPOINTS, help="may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each verb")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="folder for the models and what is made of them"
    )
    parser.add_argument(
        "--discard", action="store_true", help="remove each model once it is measured"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="directory for the JSON; any but the default leaves docs/benchmarks.md as it is",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the result, update the page and print the tables."""
    args = _parse(argv)
    args.results.mkdir(parents=True, exist_ok=True)
    out = args.results / "outofcore.json"
    for name in args.shape or _DEFAULT_SHAPES:
        folder = args.cache.resolve() / name
        found = to_plain(measure(CHECKPOINTS[name], folder, args.rounds))
        if args.discard:
            shutil.rmtree(folder)
        # Beside the other shapes, which may have been measured at another time.
        known = json.loads(out.read_text("utf-8")) if out.exists() else {}
        result = {n: {**known, name: found}[n] for n in CHECKPOINTS if n in {*known, name}}
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        _say(f"{out} written")
    print(tables(result))
    if args.results == RESULTS:
        put(PAGE, BEGIN, tables(result))


if __name__ == "__main__":
    main()
