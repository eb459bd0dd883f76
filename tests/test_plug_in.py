# SPDX-License-Identifier: Apache-2.0
"""Plug-in: each method, what is replaced, what is only linked, and an output in the way."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open

from offsite_ray.architectures import load_model
from offsite_ray.bundle import TensorDirectory
from offsite_ray.cli import main
from offsite_ray.config import CompressConfig, PlugInConfig, VerifyConfig
from offsite_ray.emulator import compress
from offsite_ray.errors import StorageError
from offsite_ray.inspection import verify
from offsite_ray.plug_in import PlugInResult, plug_in
from tests.adapters import METHODS, make_adapter
from tests.tiny_models import save_tiny

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

TOKENS = (torch.arange(24) * 7 % 97 + 1).view(2, 12)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a full model in many files, and a bundle that keeps every block.

    Adapter blocks are 0 and 5, so the trained emulator model is what the plugged-in one must be.
    """
    root = tmp_path_factory.mktemp("plug-in")
    model = str(save_tiny("gpt2", root / "full", max_shard_size=20_000))
    compress(CompressConfig(model=model, plan="1-4-1", out=str(root / "bundle")))
    return root


def plugged(
    good: Path, tmp_path: Path, method: str, noise: float
) -> tuple[PreTrainedModel, PlugInResult, Path]:
    """Return the model that was trained, what plug-in said, and what it wrote."""
    trained = make_adapter(good / "bundle", tmp_path / "adapter", method=method, noise=noise)
    config = PlugInConfig(
        model=str(good / "full"), adapter=str(tmp_path / "adapter"), out=str(tmp_path / "out")
    )
    return trained, plug_in(config), tmp_path / "out"


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(TOKENS, use_cache=False).logits
    return logits


def changed(before: Path, after: Path) -> set[str]:
    """Return the names of the tensors that differ in a bit."""
    old, new = TensorDirectory.of_model(before), TensorDirectory.of_model(after)
    assert old.tensors.keys() == new.tensors.keys()
    return {name for name in old.tensors if bytes(old.data(name)) != bytes(new.data(name))}


@pytest.mark.parametrize("method", METHODS)
def test_untrained_it_changes_no_bit(good: Path, tmp_path: Path, method: str) -> None:
    _, _, out = plugged(good, tmp_path, method, noise=0.0)
    assert changed(good / "full", out) == set()
    assert torch.equal(logits_of(load_model(out)), logits_of(load_model(good / "full")))


@pytest.mark.parametrize("method", METHODS)
def test_trained_it_computes_what_was_trained(good: Path, tmp_path: Path, method: str) -> None:
    trained, result, out = plugged(good, tmp_path, method, noise=0.05)
    expected, found = logits_of(trained), logits_of(load_model(out))
    assert (expected - logits_of(load_model(good / "full"))).abs().max() > 1e-2
    if method == "lora":  # merged, so the sum is taken in another order
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(found, expected)
    assert changed(good / "full", out) == set(result.replaced)
    assert {name.split(".")[2] for name in result.replaced} <= {"0", "5"}
    assert bool(result.replaced) is (method != "bottleneck")


def test_verbose_lists_every_replaced_tensor(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(good / "bundle", tmp_path / "adapter", noise=0.05)
    words = ["--model", str(good / "full"), "--adapter", str(tmp_path / "adapter")]
    capsys.readouterr()
    assert main(["plug-in", *words, "--out", str(tmp_path / "quiet")]) == 0
    assert "replaced transformer" not in capsys.readouterr().err
    assert main(["plug-in", *words, "--out", str(tmp_path / "out"), "--verbose"]) == 0
    said = capsys.readouterr().err
    listed = said.count("replaced transformer.")
    names = changed(good / "full", tmp_path / "out")
    assert listed == len(names) > 0
    assert all(f"replaced {name} (F32 [" in said for name in names)


def test_verbose_lists_what_lies_beside_the_weights(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(good / "bundle", tmp_path / "adapter", method="bottleneck", noise=0.05)
    words = ["--model", str(good / "full"), "--adapter", str(tmp_path / "adapter")]
    assert main(["plug-in", *words, "--out", str(tmp_path / "out"), "--verbose"]) == 0
    listed = [line for line in capsys.readouterr().err.splitlines() if "beside the weights" in line]
    with safe_open(tmp_path / "out/bottleneck.safetensors", "pt") as beside:
        assert len(listed) == len(beside.keys()) == 8
        for name, line in zip(sorted(beside.keys()), listed, strict=True):
            shape = list(beside.get_tensor(name).shape)
            assert line == f"added {name} (F32 {shape}) beside the weights"


@pytest.mark.parametrize("can_link", [True, False])
def test_files_without_a_replaced_tensor_are_linked_or_copied(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, can_link: bool
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    if not can_link:
        monkeypatch.setattr(os, "link", refuse)
    _, result, out = plugged(good, tmp_path, "full", noise=0.05)
    weights = TensorDirectory.of_model(out)
    rewritten = {weights.tensors[name].file.name for name in result.replaced}
    names = {file.name for file in weights.files}
    assert rewritten
    assert rewritten < names
    for name in names:
        ours, theirs = out / name, good / "full" / name
        assert ours.samefile(theirs) is (can_link and name not in rewritten)
        assert (ours.read_bytes() == theirs.read_bytes()) is (name not in rewritten)
    assert verify(VerifyConfig(path=str(out))).num_files > len(names)


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_an_existing_output_is_refused_untouched(good: Path, tmp_path: Path, kind: str) -> None:
    make_adapter(good / "bundle", tmp_path / "adapter")
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
        (out / "mine.txt").write_text("x")
    elif kind == "file":
        out.write_text("x")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    adapter = str(tmp_path / "adapter")
    with pytest.raises(StorageError, match="out"):
        plug_in(PlugInConfig(model=str(good / "full"), adapter=adapter, out=str(out)))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
