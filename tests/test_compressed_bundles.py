# SPDX-License-Identifier: Apache-2.0
"""Bundles with compressed matrices: which tensors change, how they are stored, what loads them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from offsite_ray.architectures import load_model, load_tokenizer
from offsite_ray.compression import parse_compression
from offsite_ray.config import CompressConfig, UnpackConfig, VerifyConfig
from offsite_ray.emulator import compress, open_bundle, unpack
from offsite_ray.errors import BundleError, IntegrityError, OffsiteError, StorageError
from offsite_ray.inspection import inspect_path, verify
from tests.adapters import METHODS, make_adapter
from tests.damage import edit_json, edit_tensors, reseal
from tests.stock import CUT, blocks_in, logits_of, plug, same_bytes, stock, stored
from tests.tiny_models import save_tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

FAMILIES = ["gpt2", "opt", "bloom", "llama", "qwen3", "gemma3_text", "mixtral", "phi3"]
EMULATOR = {1: 1, 3: 4}
"""Place of each emulator block in the bundle of the plan, and in the full model."""

_AutoModel: Any = AutoModelForCausalLM


def compressed(model: Path, out: Path, text: str, plan: str = CUT) -> Path:
    compress(CompressConfig(model=str(model), plan=plan, out=str(out), compress=text))
    return out


def unpacked(bundle: Path, out: Path) -> Path:
    unpack(UnpackConfig(bundle=str(bundle), out=str(out)))
    return out


@dataclass(frozen=True)
class Case:
    """A family's tiny full model, wide enough for two groups of inputs, and its plain bundle."""

    family: str
    model: Path
    plain: Path


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp(request.param)
    model = save_tiny(request.param, root / "full", hidden_size=136)
    return Case(request.param, model, compressed(model, root / "plain", "none"))


def matrices_of(directory: Path, place: int) -> dict[str, Tensor]:
    """Return the weights of a stock model's linear layers in a block, as ``(out, in)``."""
    found = {}
    for name, module in blocks_in(stock(directory))[place].named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight.data
            found[name] = weight.T if isinstance(module, Conv1D) else weight
    # Mixtral's experts are fused in memory: (experts, out, in).
    for name, parameter in blocks_in(stock(directory))[place].named_parameters():
        if parameter.ndim == 3:
            found |= {f"{name}.{index}": expert for index, expert in enumerate(parameter.data)}
    return found


@pytest.mark.parametrize("text", ["prune:0.5", "prune:2:4", "quantize:3", "low_rank:0.4"])
def test_only_matrices_of_emulator_blocks_change(case: Case, tmp_path: Path, text: str) -> None:
    bundle = compressed(case.model, tmp_path / "bundle", text)
    before, after = stock(case.plain), stock(bundle)
    for place, block in enumerate(blocks_in(after)):
        old = dict(blocks_in(before)[place].named_parameters())
        changed = {n for n, p in block.named_parameters() if not torch.equal(p, old[n])}
        linear = {
            f"{name}.weight"
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
        experts = {name for name, parameter in block.named_parameters() if parameter.ndim == 3}
        assert changed == (linear | experts if place in EMULATOR else set())
    for name, parameter in before.named_parameters():
        if ".layers." not in name and ".h." not in name:
            assert torch.equal(parameter, after.get_parameter(name))
    layouts = [{n: (t.dtype, t.shape) for n, t in stored(d).items()} for d in (case.plain, bundle)]
    assert layouts[0] == layouts[1], "stored as they were"


@pytest.mark.parametrize("text", ["prune:0.3", "prune:2:4", "quantize:4", "low_rank:0.5+prune:1:2"])
def test_a_matrix_becomes_what_the_method_makes_of_it(
    case: Case, tmp_path: Path, text: str
) -> None:
    bundle = compressed(case.model, tmp_path / "bundle", text)
    if text == "quantize:4":
        bundle = unpacked(bundle, tmp_path / "unpacked")
    method = parse_compression(text)
    for place in EMULATOR:
        before, after = matrices_of(case.plain, place), matrices_of(bundle, place)
        assert before.keys() == after.keys()
        for name, matrix in before.items():
            # Mixtral's up and gate matrices are stored apart and fused in memory.
            halves = matrix.chunk(2) if name.startswith("mlp.experts.gate_up") else [matrix]
            expected = torch.cat([method.apply(half.float().contiguous()) for half in halves])
            assert torch.equal(after[name], expected), name


@pytest.mark.parametrize("text", ["quantize:8", "quantize:4"])
def test_a_packed_bundle_computes_what_it_unpacks_to(case: Case, tmp_path: Path, text: str) -> None:
    packed = compressed(case.model, tmp_path / "packed", text)
    plain = unpacked(packed, tmp_path / "unpacked")
    logits = logits_of(load_model(packed))
    assert torch.equal(logits, logits_of(stock(plain)))
    error = float((logits - logits_of(stock(case.plain))).norm() / logits.norm())
    assert 0 < error < {"quantize:8": 0.05, "quantize:4": 0.8}[text]
    config = load_model(packed).generation_config
    assert config == stock(plain).generation_config


def test_a_packed_bundle_is_as_small_as_it_says(case: Case, tmp_path: Path) -> None:
    packed = compressed(case.model, tmp_path / "packed", "quantize:4")
    saved, tensors = stored(packed), stored(case.plain)
    matrices = [name.removesuffix(".int4") for name in saved if name.endswith(".int4")]
    assert len(matrices) >= 4 * len(EMULATOR)
    for name in matrices:
        rows, columns = tensors[name].shape
        if case.family == "gpt2":
            rows, columns = columns, rows
        assert saved[f"{name}.int4"].nbytes == rows * -(-columns // 2)
        assert saved[f"{name}.scales"].nbytes == 4 * rows * -(-columns // 128)
    manifest = open_bundle(packed).manifest
    assert manifest.measured["bundle_bytes"] == sum(tensor.nbytes for tensor in saved.values())
    assert manifest.dtypes["packed"]["num_tensors"] == len(matrices)
    assert "offsite-ray unpack" in manifest.dtypes["packed"]["needs"]
    described, plain = inspect_path(packed), inspect_path(case.plain)
    assert described["num_parameters"] == plain["num_parameters"]
    assert described["tensor_bytes"] == manifest.measured["bundle_bytes"] < plain["tensor_bytes"]
    verify(VerifyConfig(path=str(packed), model=str(case.model)))


def test_stock_transformers_refuses_a_packed_bundle(case: Case, tmp_path: Path) -> None:
    packed = compressed(case.model, tmp_path / "packed", "quantize:8")
    with pytest.raises(ValueError, match="offsite_packed"):
        _AutoModel.from_pretrained(str(packed))
    cls: Any = type(stock(case.plain))
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        cls.from_pretrained(str(packed))
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        cls.from_pretrained(str(packed), config=cls.config_class.from_pretrained(case.plain))
    assert "offsite-ray unpack" in json.loads((packed / "config.json").read_text())["needs"]


@pytest.mark.parametrize("text", ["prune:2:4", "quantize:4"])
def test_an_adapter_of_a_compressed_bundle_fits_the_full_model(
    case: Case, tmp_path: Path, text: str
) -> None:
    bundle = compressed(case.model, tmp_path / "bundle", text)
    make_adapter(bundle, tmp_path / "untrained")
    plug(case.model, tmp_path / "untrained", tmp_path / "same")
    assert same_bytes(stored(tmp_path / "same"), stored(case.model))
    for method in METHODS[:2]:
        trained = make_adapter(bundle, tmp_path / method, method=method, noise=0.05)
        assert not torch.equal(logits_of(trained), logits_of(load_model(bundle)))
        plug(case.model, tmp_path / method, tmp_path / f"plugged-{method}")
        plugged = logits_of(stock(tmp_path / f"plugged-{method}"))
        assert not torch.equal(plugged, logits_of(stock(case.model)))


def test_the_tokenizer_of_a_packed_bundle_is_the_models(case: Case, tmp_path: Path) -> None:
    packed = compressed(case.model, tmp_path / "packed", "quantize:8")
    ours, theirs = load_tokenizer(packed), AutoTokenizer.from_pretrained(str(case.plain))
    assert type(ours) is type(theirs)
    assert ours("Hello, you")["input_ids"] == theirs("Hello, you")["input_ids"]


# Of one family


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("tiny") / "full", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def packed(tiny: Path) -> Path:
    return compressed(tiny, tiny.parent / "packed", "quantize:4")


def test_equal_requests_give_equal_bytes(tiny: Path, tmp_path: Path) -> None:
    for text in ("prune:0.5", "quantize:4", "low_rank:0.5"):
        files = [
            open_bundle(compressed(tiny, tmp_path / f"{text}-{i}", text)).manifest.files
            for i in range(2)
        ]
        assert files[0] == files[1]


def test_bfloat16_stays_bfloat16(tiny: Path, packed: Path, tmp_path: Path) -> None:
    for bundle in (packed, compressed(tiny, tmp_path / "bundle", "low_rank:0.5")):
        assert {p.dtype for p in load_model(bundle).parameters()} == {torch.bfloat16}
    weights = open_bundle(packed).weights
    name = next(iter(load_file(packed / "packed.safetensors"))).removesuffix(".scales")
    assert bytes(weights.data(name)) == b"".join(map(bytes, weights.pieces(name)))
    whole = bytes(weights.data(name))
    assert weights.sample(name, [0, 6], 4) == whole[:4] + whole[6:10]
    assert torch.equal(weights.view(name), weights.read(name))


def test_the_recipe_is_in_the_manifest(tiny: Path, tmp_path: Path) -> None:
    bundle = compressed(tiny, tmp_path / "bundle", "prune:2:4+quantize:8")
    recipe = inspect_path(bundle)["recipe"]["compression"]
    assert recipe["method"] == "prune:2:4+quantize:8"
    assert [step["method"] for step in recipe["steps"]] == ["prune", "quantize"]
    assert (recipe["steps"][0]["kept"], recipe["steps"][1]["bits"]) == (2, 8)
    values = load_file(bundle / "packed.safetensors")
    for name, tensor in values.items():
        if name.endswith(".int8"):
            zeros = (tensor == 0).view(len(tensor), -1, 4).sum(-1)
            assert bool((zeros >= 2).all())


def test_a_plan_without_emulator_blocks_has_nothing_to_pack(tiny: Path, tmp_path: Path) -> None:
    bundle = compressed(tiny, tmp_path / "bundle", "quantize:4", plan="1-0-1")
    stock(bundle)
    assert "packed" not in open_bundle(bundle).manifest.dtypes


def test_a_packed_bundle_of_several_files_is_one(
    tiny: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = ("offsite_ray.bundle.shards.write_shards.__defaults__", (20_000,))
    monkeypatch.setattr(*defaults)
    several = compressed(tiny, tmp_path / "several", "quantize:4")
    assert len(list(several.glob("packed-0000*.safetensors"))) > 2
    assert torch.equal(logits_of(load_model(several)), logits_of(load_model(packed)))
    assert len(open_bundle(several).weights.files) > 2


def test_a_packed_bundle_is_no_full_model(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"packed weights; .*'offsite-ray unpack'"):
        compressed(packed, tmp_path / "again", "none", plan="1-1-1")
    assert not (tmp_path / "again").exists()


def test_what_is_not_packed_cannot_be_unpacked(tiny: Path, packed: Path, tmp_path: Path) -> None:
    plain = compressed(tiny, tmp_path / "plain", "prune:0.5")
    with pytest.raises(BundleError, match=r"nothing in .* is packed"):
        unpacked(plain, tmp_path / "out")
    again = unpacked(packed, tmp_path / "unpacked")
    manifest = open_bundle(again).manifest
    assert manifest.recipe["unpack"] == {"bundle": open_bundle(packed).manifest.id}
    assert manifest.dtypes == {"stored": ["bfloat16"]}
    verify(VerifyConfig(path=str(again), model=str(tiny)))
    with pytest.raises(BundleError, match=r"nothing in .* is packed"):
        unpacked(again, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_matrix_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "full")
    name = "model.layers.4.mlp.up_proj.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 4] = float("nan")

    edit_tensors(model / "model.safetensors", spoil)
    for text in ("prune:0.5", "quantize:8"):
        with pytest.raises(IntegrityError, match=rf"{name}.*not finite.*--compress none"):
            compressed(model, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_a_matrix_in_eight_bit_floats_is_refused(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "full")

    def narrow(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.4.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    edit_tensors(model / "model.safetensors", narrow)
    with pytest.raises(IntegrityError, match="float8_e4m3fn, and only float64"):
        compressed(model, tmp_path / "out", "quantize:8")


# Packed bundles from somebody else


def _entry(values: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(iter(values["packed"]["tensors"].values()))
    return entry


def _parts(tensors: dict[str, Tensor]) -> tuple[str, str]:
    values = min(name for name in tensors if name.endswith(".int4"))
    return values, values.replace(".int4", ".scales")


CONFIGS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no layout": lambda v: v.pop("packed"),
    "a layout that is a list": lambda v: v.update(packed=[1]),
    "groups of another size": lambda v: v["packed"].update(group_size=64),
    "no tensors": lambda v: v["packed"].update(tensors={}),
    "tensors in a list": lambda v: v["packed"].update(tensors=[]),
    "bits that nobody packs": lambda v: _entry(v).update(bits=3),
    "bits that are text": lambda v: _entry(v).update(bits="4"),
    "a shape of three": lambda v: _entry(v).update(shape=[1, 2, 3]),
    "a negative shape": lambda v: _entry(v).update(shape=[-1, 2]),
    "another shape": lambda v: _entry(v).update(shape=[2**20, 2**20]),
    "an unknown dtype": lambda v: _entry(v).update(dtype="object"),
    "a transposition that is no truth": lambda v: _entry(v).update(transposed=1),
    "a tensor less": lambda v: v["packed"]["tensors"].popitem(),
    "a tensor more": lambda v: v["packed"]["tensors"].update(x=_entry(v)),
    "no base": lambda v: v.pop("base_config"),
    "a stock type": lambda v: v.update(v["base_config"]),
}

TENSORS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "values missing": lambda t: t.pop(_parts(t)[0]),
    "scales missing": lambda t: t.pop(_parts(t)[1]),
    "values cut": lambda t: t.update({_parts(t)[0]: t[_parts(t)[0]][1:]}),
    "scales of two bytes": lambda t: t.update({_parts(t)[1]: t[_parts(t)[1]].half()}),
    "signed values": lambda t: t.update({_parts(t)[0]: t[_parts(t)[0]].to(torch.int8)}),
    "beside itself": lambda t: t.update({_parts(t)[0].removesuffix(".int4"): torch.zeros(1)}),
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_a_config_that_misdescribes_packed_tensors_is_refused(
    packed: Path, tmp_path: Path, damage: str
) -> None:
    bundle = _copied(packed, tmp_path)
    edit_json(bundle / "config.json", CONFIGS[damage])
    _refused(bundle)


@pytest.mark.parametrize("damage", TENSORS)
def test_packed_tensors_that_do_not_fit_are_refused(
    packed: Path, tmp_path: Path, damage: str
) -> None:
    bundle = _copied(packed, tmp_path)
    edit_tensors(bundle / "packed.safetensors", TENSORS[damage])
    _refused(bundle)


def test_weights_that_nothing_reads_are_refused(tiny: Path, packed: Path, tmp_path: Path) -> None:
    bundle = _copied(packed, tmp_path)
    (bundle / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    reseal(bundle)
    with pytest.raises(IntegrityError, match=r"'model.safetensors', which is no part"):
        open_bundle(bundle)


def _copied(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "bundle")
    return tmp_path / "bundle"


def _refused(bundle: Path) -> None:
    """A bundle that was tampered with in a way that its digests do not show."""
    reseal(bundle)
    with pytest.raises(OffsiteError):
        open_bundle(bundle)
    with pytest.raises(OffsiteError):
        load_model(bundle)
