# SPDX-License-Identifier: Apache-2.0
"""``offsite-ray prepare``: the same blocks by any number of workers, on any filesystem, or none."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.architectures import load_config
from offsite_ray.cli import main
from offsite_ray.cli.preparing import PartLines
from offsite_ray.data import (
    PartsRecord,
    is_prepared,
    open_prepared,
    parts,
    place_of,
    write_blocks,
)
from offsite_ray.errors import ClusterError, ConfigError, IntegrityError, StorageError
from offsite_ray.prepare import write_on_ray
from offsite_ray.storage import DATA_MANIFEST
from offsite_ray.training.sources import prepared_for
from tests.conftest import ROOT
from tests.killers import dying_in
from tests.stores import SECRET, Store
from tests.texts import columns_of, save_tokenizer, write_rows

if TYPE_CHECKING:
    from collections.abc import Generator

    from offsite_ray.data import PartWriter, PrepareResult, WrittenPart
    from tests.loops import Loop

SENTENCES = [f"The cat {i} sat on the mat {i * 7 % 13}. " for i in range(200)]
COMPLETION = {"prompt": "Where? ", "completion": "On the mat. " * 3}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a folder of every form, which makes nine parts."""
    monkeypatch.setattr(parts, "_PART_BYTES", 2000)
    folder = tmp_path / "sources"
    rows = [{"text": text} for text in SENTENCES]
    write_rows(folder / "a.jsonl", [*rows[:150], COMPLETION, *rows[150:]])
    write_rows(folder / "b.parquet", [{"text": text.upper()} for text in SENTENCES[:50]])
    (folder / "c.txt").write_text("\n".join(SENTENCES[:30]))
    return str(folder)


def on_ray(num_workers: int) -> Any:
    return functools.partial(write_on_ray, num_workers=num_workers)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# The same whoever writes it


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("seed", [None, 7])
def test_the_number_of_workers_changes_nothing(
    tokenizer_dir: Path, sources: str, tmp_path: Path, seed: int | None
) -> None:
    seen: list[PartsRecord] = []
    here = write_blocks([sources], tokenizer_dir, 64, tmp_path / "0", seed=seed)
    for workers in (1, 3):
        result = write_blocks(
            [sources],
            tokenizer_dir,
            64,
            tmp_path / str(workers),
            seed=seed,
            write_parts=on_ray(workers),
            report=seen.append,
        )
        assert contents(tmp_path / str(workers)) == contents(tmp_path / "0")
        assert (result.digest, result.num_tokens) == (here.digest, here.num_tokens)
    num_parts = seen[0].num_parts
    assert num_parts > 5
    assert [record.num_done for record in seen] == [*range(1, num_parts + 1)] * 2
    assert seen[-1].num_tokens == here.num_tokens


def test_a_seed_changes_the_order_of_the_documents_and_nothing_else(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_PART_BYTES", 200)
    rows = [{"prompt": "", "completion": f"document {index:03}"} for index in range(64)]
    source = write_rows(tmp_path / "a.jsonl", rows)

    def made(name: str, seed: int | None) -> tuple[PrepareResult, list[tuple[int, ...]]]:
        result = write_blocks([str(source)], tokenizer_dir, 13, tmp_path / name, seed=seed)
        return result, [tuple(row) for row in columns_of(tmp_path / name)["input_ids"]]

    (plain, in_order), (first, shuffled), (again, same), (other, differently) = (
        made(str(number), seed) for number, seed in enumerate((None, 1, 1, 2))
    )
    assert sorted(in_order) == sorted(shuffled) == sorted(differently) == in_order
    assert in_order != shuffled != differently
    assert (again.digest, same) == (first.digest, shuffled)
    assert len({plain.digest, first.digest, other.digest}) == 3
    # Within parts as well as among them: neighbours of old are apart.
    assert len({*pairwise(in_order)} & {*pairwise(shuffled)}) < 20


# What goes wrong on a worker


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_bad_row_is_the_same_line_from_a_worker(
    tokenizer_dir: Path, sources: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sources/a.jsonl"
    lines = file.read_text().splitlines()
    lines[200] = '{"text": "a'
    file.write_text("\n".join(lines))
    before = sorted(path.name for path in tmp_path.iterdir())
    words = ["prepare", "--tokenizer", str(tokenizer_dir), "--text", sources]
    said = []
    for workers in ("0", "2"):
        out = ["--out", str(tmp_path / "new/out"), "--num-workers", workers]
        assert main([*words, *out]) == 2
        captured = capfd.readouterr()
        assert captured.out == ""
        said.append(captured.err)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    expected = f"{file}, line 201 is no JSON: Unterminated string starting at (column 10)"
    assert said == [f"offsite-ray: error: {expected}\n"] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_is_replaced(tokenizer_dir: Path, sources: str, tmp_path: Path) -> None:
    here = write_blocks([sources], tokenizer_dir, 64, tmp_path / "0")
    dying = dying_in(2, tmp_path / "died", on_ray(2))
    result = write_blocks([sources], tokenizer_dir, 64, tmp_path / "2", write_parts=dying)
    assert (tmp_path / "died").exists()
    assert result.digest == here.digest
    assert contents(tmp_path / "2") == contents(tmp_path / "0")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_part_that_kills_its_workers_ends_the_run(
    tokenizer_dir: Path, sources: str, tmp_path: Path
) -> None:
    dying = dying_in(2, None, on_ray(2))
    with pytest.raises(ClusterError, match=r"4 workers died over .*sources/a.jsonl"):
        write_blocks([sources], tokenizer_dir, 64, tmp_path / "out", write_parts=dying)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sources"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_the_cluster_holds(
    tokenizer_dir: Path, sources: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="64 workers need 64 CPUs"):
        write_blocks([sources], tokenizer_dir, 64, tmp_path / "out", write_parts=on_ray(64))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sources"]


# Whole or not at all


def test_of_two_that_write_one_name_the_second_is_refused(
    tokenizer_dir: Path, sources: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def interrupted(writer: PartWriter) -> Generator[WrittenPart, None, None]:
        write_blocks([sources], tokenizer_dir, 32, out)
        yield from map(writer, range(len(writer.parts)))

    with pytest.raises(StorageError, match="out"):
        write_blocks([sources], tokenizer_dir, 64, out, write_parts=interrupted)
    assert json.loads((out / DATA_MANIFEST).read_text())["block_size"] == 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sources"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_ended_leaves_nothing_under_its_name(
    tokenizer_dir: Path, tmp_path: Path, how: signal.Signals, workers: int
) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": text * 20} for text in SENTENCES] * 300)
    words = ["prepare", "--tokenizer", str(tokenizer_dir), "--text", str(source), "--block-size"]
    words += ["512", "--out", str(tmp_path / "out"), "--num-workers", str(workers)]
    process = subprocess.Popen(
        [sys.executable, "-m", "offsite_ray", *words], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob(".out.tmp-*/part-*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    _, said = process.communicate()
    assert not (tmp_path / "out").exists()
    if how == signal.SIGINT:
        assert (process.returncode, said) == (130, "offsite-ray: interrupted\n")
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# Object stores


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("workers", [0, 2])
def test_from_an_object_store_to_an_object_store(
    tokenizer_dir: Path, sources: str, tmp_path: Path, store: Store, workers: int
) -> None:
    here = write_blocks([sources], tokenizer_dir, 64, tmp_path / "0")
    store.upload(Path(sources), f"from-{workers}")
    run = {"write_parts": on_ray(workers)} if workers else {}
    out = store.uri(f"to-{workers}")
    result = write_blocks([store.uri(f"from-{workers}")], tokenizer_dir, 64, out, **run)
    assert result.digest == here.digest
    assert result.out == f"s3://bucket/to-{workers}"
    assert is_prepared(out)
    with pytest.raises(StorageError, match=f"^s3://bucket/to-{workers} holds prepared data"):
        write_blocks([sources], tokenizer_dir, 64, out)


def test_a_prefix_without_a_manifest_is_no_prepared_data(
    tokenizer_dir: Path, sources: str, store: Store
) -> None:
    out = store.uri("killed")

    def failing(writer: PartWriter) -> Generator[WrittenPart, None, None]:
        yield writer(0)
        assert [name[9:] for name in store.names("killed")] == ["part-00000.parquet"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_blocks([sources], tokenizer_dir, 64, out, write_parts=failing)
    assert store.names("killed") == []
    place = place_of(out)
    with place.filesystem.open_output_stream(
        place.below("0123abcd/part-00000.parquet").path
    ) as stream:
        stream.write(b"left over")
    assert not is_prepared(out)
    write_blocks([sources], tokenizer_dir, 64, out)
    assert is_prepared(out)


def test_a_prefix_with_something_else_in_it_is_refused(
    tokenizer_dir: Path, sources: str, store: Store
) -> None:
    store.upload(tokenizer_dir, "taken")
    before = store.names("taken")
    with pytest.raises(StorageError, match=r"^s3://bucket/taken exists and is not empty: it holds"):
        write_blocks([sources], tokenizer_dir, 64, store.uri("taken"))
    assert store.names("taken") == before


@pytest.mark.usefixtures("empty_cache")
def test_two_that_write_one_prefix_do_not_mix(
    tokenizer_dir: Path, sources: str, store: Store
) -> None:
    out = store.uri("two")

    def interrupted(writer: PartWriter) -> Generator[WrittenPart, None, None]:
        write_blocks([sources], tokenizer_dir, 32, out)
        yield from map(writer, range(len(writer.parts)))

    with pytest.raises(StorageError, match="s3://bucket/two holds prepared data"):
        write_blocks([sources], tokenizer_dir, 64, out, write_parts=interrupted)
    assert len({name.split("/")[0] for name in store.names("two")}) == 2
    assert open_prepared(out, tokenizer_dir, 128).block_size == 32


@pytest.mark.usefixtures("empty_cache")
def test_two_that_write_the_same_to_one_prefix_both_end_well(
    tokenizer_dir: Path, sources: str, store: Store
) -> None:
    out = store.uri("same")

    def interrupted(writer: PartWriter) -> Generator[WrittenPart, None, None]:
        write_blocks([sources], tokenizer_dir, 64, out)
        yield from map(writer, range(len(writer.parts)))

    result = write_blocks([sources], tokenizer_dir, 64, out, write_parts=interrupted)
    assert open_prepared(out, tokenizer_dir, 128).digest == result.digest


@pytest.mark.usefixtures("empty_cache")
def test_training_fetches_what_it_reads_often(
    loop: Loop, sources: str, tmp_path: Path, store: Store
) -> None:
    config = load_config(loop.model)
    source = store.uri("for-training")
    made = write_blocks([sources], loop.model, 64, source)
    data = prepared_for([source], loop.model, config, None, tmp_path / "run", None)
    assert (data.digest, data.uri, data.at_hand) == (made.digest, source, data.path)
    assert is_prepared(data.path)
    place = place_of(source)
    damaged = next(file for file, _ in place.files() if file.path.endswith(".parquet"))
    with place.filesystem.open_output_stream(damaged.path) as stream:
        stream.write(b"damaged")
    with pytest.raises(IntegrityError, match="was altered"):
        prepared_for([source], loop.model, config, None, tmp_path / "other", None)


def test_a_store_that_is_not_there_is_one_line(
    tokenizer_dir: Path, sources: str, store: Store
) -> None:
    out = f"s3://key:{SECRET}@nothere/out?{store.options}"
    with pytest.raises(StorageError, match=r"^s3://nothere/out cannot be written") as caught:
        write_blocks([sources], tokenizer_dir, 64, out)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("key", ["secret", "half/secret", "a secret", "secret%"])
def test_no_message_has_a_key_in_it(key: str) -> None:
    with pytest.raises(StorageError, match="bucket/path is on no filesystem") as caught:
        place_of(f"nothing://id:{key}@bucket/path")
    assert key not in str(caught.value)


# The command line and the job


def test_a_job_takes_the_words_of_the_verb(
    tokenizer_dir: Path, sources: str, tmp_path: Path
) -> None:
    (tmp_path / "prepare.yaml").write_text(
        f"tokenizer: {tokenizer_dir}\ntext: {sources}\nout: {tmp_path / 'out'}\nblock_size: 64\n"
    )
    job = [sys.executable, str(ROOT / "jobs/prepare.py"), "--config", "prepare.yaml"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [*job, *words], capture_output=True, text=True, check=False, cwd=tmp_path, env=environ
        )

    done = run("seed=3", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["seed"] == 3
    refused = run("sead=3")
    assert refused.returncode == 2
    assert "unknown key 'sead'; did you mean 'seed'?" in refused.stderr


def test_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0, 1, 10, 10, 12, 25, 25])
    lines = PartLines(clock=lambda: next(seconds))
    for done in range(1, 5):
        record = PartsRecord(num_done=done, num_parts=9, num_tokens=done * 1000, tokens_per_s=500.4)
        lines(record)
    assert capsys.readouterr().err == (
        "part 2/9  2,000 tokens  500 tokens/s\npart 4/9  4,000 tokens  500 tokens/s\n"
    )
