# SPDX-License-Identifier: Apache-2.0
"""Malformed bundles: refused in one line by every way in, and nothing is written."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig

from offsite_ray.adapter import open_adapter
from offsite_ray.architectures import load_model
from offsite_ray.bundle import TensorDirectory
from offsite_ray.cli import main
from offsite_ray.config import CompressConfig, PlugInConfig, VerifyConfig
from offsite_ray.emulator import compress, open_bundle
from offsite_ray.errors import FamilyError, IntegrityError, OffsiteError
from offsite_ray.inspection import verify
from offsite_ray.plug_in import plug_in
from tests.adapters import METHODS, make_adapter
from tests.damage import edit_tensors, reseal
from tests.damaged_adapters import BOTTLENECK, FULL, LORA
from tests.damaged_bundles import BESIDE_THE_WEIGHTS, EMULATOR_BUNDLES, INDEX, PLUGGED_IN, shard
from tests.damaged_files import WEIGHTS, Row
from tests.tiny_models import save_tiny

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

ADAPTERS = {"full": FULL, "lora": LORA, "bottleneck": BOTTLENECK}
BY_METHOD = [
    pytest.param(method, row, id=f"{method}-{row.name}")
    for method, rows in ADAPTERS.items()
    for row in rows
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a full model, a bundle and one adapter bundle per method, all whole."""
    root = tmp_path_factory.mktemp("good")
    save_tiny("gpt2", root / "full")
    plan = "adapter=0,3,5 emulator=1,4"
    compress(CompressConfig(model=str(root / "full"), plan=plan, out=str(root / "bundle")))
    for method in METHODS:
        adapter = root / f"adapter-{method}"
        make_adapter(root / "bundle", adapter, method=method, noise=0.05)
        out = str(root / f"plugged-{method}")
        plug_in(PlugInConfig(model=str(root / "full"), adapter=str(adapter), out=out))
    return root


def damaged(good: Path, tmp_path: Path, row: Row) -> Path:
    target = tmp_path / "damaged"
    shutil.copytree(good, target)
    row.damage(target)
    return target


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("offsite-ray: error: ")
    assert said.err[:-1].isprintable()
    assert "Traceback" not in said.err
    return said.err


def ids(rows: Iterable[Row]) -> list[Any]:
    return [pytest.param(row, id=row.name) for row in rows]


def test_the_undamaged_are_accepted(good: Path) -> None:
    assert open_bundle(good / "bundle").plan.kept == (0, 1, 3, 4, 5)
    for method in METHODS:
        assert open_adapter(good / f"adapter-{method}").method == method
        plugged = good / f"plugged-{method}"
        assert verify(VerifyConfig(path=str(plugged))).kind == "plugged_in_model"
        load_model(plugged)


def test_resealing_alone_changes_nothing(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "bundle", tmp_path / "bundle")
    reseal(tmp_path / "bundle")
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest == open_bundle(good / "bundle").manifest
    shard(tmp_path / "bundle")
    reseal(tmp_path / "bundle")
    assert len(open_bundle(tmp_path / "bundle").weights.files) == 2


@pytest.mark.parametrize("row", ids(EMULATOR_BUNDLES))
def test_a_malformed_emulator_bundle_is_refused(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Row
) -> None:
    bundle = damaged(good / "bundle", tmp_path, row)
    with pytest.raises(row.error, match=row.word):
        open_bundle(bundle)
    if row.name == "kind-swapped":
        return  # and in itself a plugged-in model
    capsys.readouterr()
    assert main(["verify", str(bundle)]) == 2
    one_line(capsys)


@pytest.mark.parametrize(("method", "row"), BY_METHOD)
def test_a_malformed_adapter_is_refused(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, row: Row
) -> None:
    adapter = damaged(good / f"adapter-{method}", tmp_path, row)
    (tmp_path / "results").mkdir()
    full, out = str(good / "full"), str(tmp_path / "results" / "plugged")
    with pytest.raises(row.error, match=row.word):
        plug_in(PlugInConfig(model=full, adapter=str(adapter), out=out))
    capsys.readouterr()
    assert main(["plug-in", "--model", full, "--adapter", str(adapter), "--out", out]) == 2
    one_line(capsys)
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.parametrize(("method", "row"), BY_METHOD)
def test_verify_with_the_full_model_refuses_what_plug_in_refuses(
    good: Path, tmp_path: Path, method: str, row: Row
) -> None:
    adapter = damaged(good / f"adapter-{method}", tmp_path, row)
    if row.name == "kind-swapped":
        return
    with pytest.raises(OffsiteError):
        verify(VerifyConfig(path=str(adapter), model=str(good / "full")))


@pytest.mark.parametrize("verb", ["finetune", "distill", "evaluate", "inspect"])
def test_every_verb_refuses_an_altered_manifest(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    row = next(row for row in EMULATOR_BUNDLES if row.name == "plan-altered")
    bundle = str(damaged(good / "bundle", tmp_path, row))
    (tmp_path / "text.txt").write_text("Once upon a time. " * 50, encoding="utf-8")
    text, out, full = str(tmp_path / "text.txt"), str(tmp_path / "out"), str(good / "full")
    words = {
        "finetune": ["--bundle", bundle, "--data", text, "--out", out],
        "distill": ["--model", full, "--bundle", bundle, "--data", text, "--out", out],
        "evaluate": ["--model", full, "--bundle", bundle, "--text", text],
        "inspect": [bundle],
    }
    capsys.readouterr()
    assert main([verb, *words[verb]]) == 2
    assert "altered" in one_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "text.txt"]


@pytest.mark.parametrize("shape", [(31,), (0,), (1, 32), ()])
def test_a_bundle_with_a_tensor_of_another_shape_cannot_be_loaded(
    good: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    shutil.copytree(good / "bundle", tmp_path / "bundle")
    edit_tensors(
        tmp_path / "bundle" / "model.safetensors",
        lambda tensors: tensors.update({"transformer.h.1.ln_1.weight": torch.ones(shape)}),
    )
    reseal(tmp_path / "bundle")
    with pytest.raises(IntegrityError, match=r"h\.1\.ln_1\.weight"):
        load_model(tmp_path / "bundle")


@pytest.mark.parametrize("row", ids(PLUGGED_IN))
def test_a_malformed_plugged_in_model_is_refused(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Row
) -> None:
    plugged = damaged(good / "plugged-bottleneck", tmp_path, row)
    with pytest.raises(row.error, match=row.word):
        verify(VerifyConfig(path=str(plugged)))
    capsys.readouterr()
    assert main(["verify", str(plugged)]) == 2
    one_line(capsys)


@pytest.mark.parametrize("row", ids(BESIDE_THE_WEIGHTS))
def test_a_plugged_in_model_is_not_loaded_without_its_bottlenecks(
    good: Path, tmp_path: Path, row: Row
) -> None:
    with pytest.raises(row.error, match=row.word):
        load_model(damaged(good / "plugged-bottleneck", tmp_path, row))


def test_a_model_with_bottlenecks_is_not_cut_without_them(good: Path, tmp_path: Path) -> None:
    config = CompressConfig(
        model=str(good / "plugged-bottleneck"), plan="1-2-1", out=str(tmp_path / "bundle")
    )
    with pytest.raises(FamilyError, match="bottleneck adapters beside"):
        compress(config)
    assert list(tmp_path.iterdir()) == []


def test_one_file_may_have_an_index(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "bundle", tmp_path / "bundle")
    names = TensorDirectory.of_model(tmp_path / "bundle").tensors
    index = {"weight_map": dict.fromkeys(names, WEIGHTS)}
    (tmp_path / "bundle" / INDEX).write_text(json.dumps(index), encoding="utf-8")
    reseal(tmp_path / "bundle")
    assert open_bundle(tmp_path / "bundle").weights.tensors.keys() == names.keys()


def test_lora_settings_as_peft_writes_them_are_accepted(good: Path, tmp_path: Path) -> None:
    """All that this version of PEFT knows at its default, and a hint that PEFT itself overrules."""
    adapter = tmp_path / "adapter"
    shutil.copytree(good / "adapter-lora", adapter)
    ours = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    LoraConfig(
        r=ours["r"], lora_alpha=ours["lora_alpha"], target_modules=ours["target_modules"]
    ).save_pretrained(str(adapter))
    theirs = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert theirs["fan_in_fan_out"] is not ours["fan_in_fan_out"]
    reseal(adapter)
    for name, path in (("ours", good / "adapter-lora"), ("theirs", adapter)):
        out = str(tmp_path / name)
        plug_in(PlugInConfig(model=str(good / "full"), adapter=str(path), out=out))
    weights = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("ours", "theirs")]
    assert weights[0] == weights[1]
