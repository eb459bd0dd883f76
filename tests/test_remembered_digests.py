# SPDX-License-Identifier: Apache-2.0
"""Digests of a full model's files: remembered while nobody touches them, and never in error."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints import write_checkpoint, write_random_adapter
from offsite_ray.bundle import TensorDirectory, read_manifest, remembered
from offsite_ray.config import VerifyConfig
from offsite_ray.errors import IntegrityError
from offsite_ray.inspection import verify
from tests.checkpoints import small_opt
from tests.stock import cut, plug


def settled(model: Path) -> list[Path]:
    """Return a model's files, of a time that is long past."""
    files = sorted(model.glob("*.safetensors"))
    for file in files:
        os.utime(file, (10**9, 10**9))
    return files


def test_plug_in_reads_a_model_once_that_nobody_touches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("offsite_ray.bundle.remembered._LEAST_BYTES", 0)
    read: list[Path] = []
    module = sys.modules["offsite_ray.bundle.fingerprint"]
    read_digests = module._read_digests

    def listed(file: Path, *args: Any, **kwargs: Any) -> Any:
        read.append(file)
        return read_digests(file, *args, **kwargs)

    monkeypatch.setattr(module, "_read_digests", listed)
    model = tmp_path / "model"
    write_checkpoint(small_opt(12, 128, shard_bytes=500_000), model)
    files = settled(model)
    write_random_adapter(cut(model, "1-4-1", tmp_path / "bundle"), tmp_path / "adapter")
    ids = []
    for number in range(2):
        plug(model, tmp_path / "adapter", tmp_path / f"out-{number}")
        ids.append(read_manifest(tmp_path / f"out-{number}").files)
        assert sorted(read) == files, "the first reads each file, the second none"
    assert ids[0] == ids[1]
    for number in range(2):
        verify(VerifyConfig(path=str(tmp_path / f"out-{number}"), model=None))
    # What checks a model for somebody reads it, whatever is remembered.
    verify(VerifyConfig(path=str(tmp_path / "adapter"), model=str(model)))
    carried = read_manifest(tmp_path / "adapter").full_model.carried
    weights = TensorDirectory.of_model(model)
    assert set(read[len(files) :]) == {weights.tensors[name].file for name in carried}
    read.clear()
    os.utime(files[1])
    plug(model, tmp_path / "adapter", tmp_path / "out-2")
    assert read == [files[1]], "touched, so it is read again"


def test_a_digest_that_is_remembered_in_error_is_found_by_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("offsite_ray.bundle.remembered._LEAST_BYTES", 0)
    model = tmp_path / "model"
    write_checkpoint(small_opt(12, 128, shard_bytes=500_000), model)
    files = settled(model)
    write_random_adapter(cut(model, "1-4-1", tmp_path / "bundle"), tmp_path / "adapter")
    plug(model, tmp_path / "adapter", tmp_path / "out-0")
    middle = next(file for file in files if file.stat().st_nlink == 2)
    largest = max(TensorDirectory.of_model(model).of_file(middle), key=lambda info: info.nbytes)
    with middle.open("r+b") as stream:
        stream.seek(largest.begin + 1000)  # between two places of the sample
        old = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([255 - old]))
    os.utime(middle, (10**9, 10**9))
    plug(model, tmp_path / "adapter", tmp_path / "out-1")
    with pytest.raises(IntegrityError, match="was altered"):
        verify(VerifyConfig(path=str(tmp_path / "out-1"), model=None))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"state": {}}', '{"state": 1, "whole": 2}', "\x00"]
)
def test_digests_that_cannot_be_read_are_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("offsite_ray.bundle.remembered._LEAST_BYTES", 0)
    file = tmp_path / "some.safetensors"
    file.write_bytes(b"bytes")
    os.utime(file, (10**9, 10**9))
    found = replace(remembered.nothing_known(file), whole="1", tensors={"a": "2"})
    remembered.remember(file, found)
    assert remembered.recall(file) == found
    (entry,) = (tmp_path / "cache").rglob("*.json")
    entry.write_text(text)
    assert remembered.recall(file) == remembered.nothing_known(file)


@pytest.mark.parametrize("why", ["young", "small", "no cache", "no home"])
def test_what_may_not_be_remembered_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    if why == "no cache":
        cache.write_text("in the way")
    if why == "no home":  # as of a user that a container made up
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", staticmethod(Path("~nobody-of-that-name").expanduser))
    if why != "small":
        monkeypatch.setattr("offsite_ray.bundle.remembered._LEAST_BYTES", 0)
    file = tmp_path / "some.safetensors"
    file.write_bytes(b"bytes")
    if why != "young":
        os.utime(file, (10**9, 10**9))
    remembered.remember(file, replace(remembered.nothing_known(file), whole="1"))
    assert remembered.recall(file).whole is None
