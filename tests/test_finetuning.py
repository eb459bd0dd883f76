# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: what trains, what stays, what comes out; the baseline."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offsite_ray.adapter import open_adapter
from offsite_ray.architectures import load_model
from offsite_ray.bundle import TensorDirectory
from offsite_ray.config import FinetuneConfig, PlugInConfig
from offsite_ray.data import open_prepared, write_blocks
from offsite_ray.emulator import open_bundle
from offsite_ray.errors import ConfigError, DivergedError
from offsite_ray.finetuning import finetune
from offsite_ray.finetuning.methods import FINETUNING_METHODS
from offsite_ray.plug_in import plug_in
from offsite_ray.training import run_here
from tests.loops import Loop, ignore, make_loop

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_ray.finetuning import FinetuneResult


def run(data: Path, out: Path, **changes: Any) -> FinetuneResult:
    given = {"max_steps": 8, "batch_size": 4, "seq_len": 32, "learning_rate": 5e-3, **changes}
    config = FinetuneConfig(data=(str(data),), out=str(out), **given)
    return finetune(config, run_here, ignore)


@pytest.mark.parametrize("method", list(FINETUNING_METHODS))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_method_learns_and_plugs_in(loop: Loop, tmp_path: Path, method: str, dtype: str) -> None:
    result = run(
        loop.rows, tmp_path / "adapter", bundle=str(loop.bundle), method=method, dtype=dtype
    )
    assert result.first_loss is not None
    assert result.last_loss is not None
    assert result.last_loss < result.first_loss - 0.02
    adapter = open_adapter(tmp_path / "adapter")
    bundle = open_bundle(loop.bundle)
    assert adapter.manifest.trained_against == bundle.manifest.id
    assert adapter.manifest.measured["num_trained"] == result.num_trained
    recipe = adapter.manifest.recipe["finetuning"]
    assert (recipe["method"], recipe["seed"]) == (method, 0)
    assert "data" not in recipe, "the other party could confirm a guess of the text by its digest"
    assert not [path for path in (loop.root, tmp_path) if str(path) in json.dumps(recipe)]
    indices = {
        bundle.arch.block_of(n.removeprefix("base_model.model.")) for n in adapter.weights.tensors
    }
    assert indices <= set(bundle.plan.adapter)
    plugged = PlugInConfig(
        model=str(loop.model), adapter=str(tmp_path / "adapter"), out=str(tmp_path / "plugged")
    )
    plug_in(plugged)
    tokens = torch.arange(20)[None]
    before, after = (load_model(p)(tokens).logits for p in (loop.model, tmp_path / "plugged"))
    assert not torch.equal(before, after)


def test_lora_is_a_standard_peft_directory(loop: Loop, tmp_path: Path) -> None:
    from peft import PeftModel

    run(loop.rows, tmp_path / "adapter", bundle=str(loop.bundle), method="lora", rank=3)
    plug_in(
        PlugInConfig(
            model=str(loop.model), adapter=str(tmp_path / "adapter"), out=str(tmp_path / "plugged")
        )
    )
    stock = PeftModel.from_pretrained(load_model(loop.model), str(tmp_path / "adapter"))
    tokens = torch.arange(20)[None]
    expected = load_model(tmp_path / "plugged")(tokens).logits
    with torch.no_grad():
        assert torch.allclose(stock(tokens).logits, expected, atol=1e-4)
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["r"] == 3
    assert settings["fan_in_fan_out"] is True


@pytest.mark.parametrize("method", list(FINETUNING_METHODS))
def test_the_baseline_is_a_model_directory(loop: Loop, tmp_path: Path, method: str) -> None:
    result = run(loop.rows, tmp_path / "model", model=str(loop.model), method=method)
    assert result.id is None
    assert result.last_loss is not None
    tuned = load_model(tmp_path / "model")
    tokens = torch.arange(20)[None]
    assert not torch.equal(tuned(tokens).logits, load_model(loop.model)(tokens).logits)
    before, after = (TensorDirectory.of_model(p) for p in (loop.model, tmp_path / "model"))
    changed = {n for n in before.tensors if bytes(before.data(n)) != bytes(after.data(n))}
    everything = {"full": set(before.tensors), "bottleneck": set()}
    assert changed == everything.get(method, changed)
    assert not (tmp_path / "model/offsite.json").exists()


def test_bitfit_without_biases_is_refused(tmp_path: Path) -> None:
    loop = make_loop(tmp_path / "llama", family="llama")
    with pytest.raises(ConfigError, match="has a bias"):
        run(loop.rows, tmp_path / "out", bundle=str(loop.bundle), method="bitfit")
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_frozen_weights_keep_their_dtype(loop: Loop, tmp_path: Path) -> None:
    from offsite_ray.finetuning import FinetuneTask

    write_blocks([str(loop.rows)], loop.bundle, 16, tmp_path / "data")
    task = FinetuneTask(
        model=str(loop.bundle),
        model_id="",
        blocks=None,
        indices=(0, 3),
        config=FinetuneConfig(bundle="b", data=("d",), out="o", dtype="bf16"),
        data=open_prepared(tmp_path / "data", loop.bundle, 128),
        use_positions=True,
    )
    module = task.build(torch.device("cpu"))
    dtypes = {(p.requires_grad, p.dtype) for p in module.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert all(".h.0." in name or ".h.3." in name for name in trained)


def test_the_baseline_keeps_a_head_tied_that_is_stored_beside_the_embeddings(
    tmp_path: Path,
) -> None:
    loop = make_loop(tmp_path / "loop")
    file = loop.model / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    run(loop.rows, tmp_path / "tuned", model=str(loop.model))
    tuned = load_file(tmp_path / "tuned/model.safetensors")
    assert torch.equal(tuned["lm_head.weight"], tuned["transformer.wte.weight"])
    assert not torch.equal(tuned["lm_head.weight"], tensors["lm_head.weight"])
    model: Any = load_model(tmp_path / "tuned")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_data_of_a_run_without_a_checkpoint_is_made_anew(loop: Loop, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("x y z " * 100)
    write_blocks([str(tmp_path / "other.txt")], loop.bundle, 16, tmp_path / ".out.run/data")
    straight = run(loop.rows, tmp_path / "straight", bundle=str(loop.bundle))
    resumed = run(loop.rows, tmp_path / "out", bundle=str(loop.bundle), resume=True)
    assert resumed.first_loss == straight.first_loss


@pytest.mark.parametrize("method", list(FINETUNING_METHODS))
def test_a_run_that_diverges_in_its_last_step_writes_nothing(
    loop: Loop, tmp_path: Path, method: str
) -> None:
    given = {"method": method, "max_steps": 1, "learning_rate": 1e38}
    with pytest.raises(DivergedError, match=r"held-out loss is nan.*--learning-rate"):
        run(loop.rows, tmp_path / "out", bundle=str(loop.bundle), **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
def test_a_gpu_that_is_not_there_is_a_mistake(loop: Loop, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--use-gpu.*leave it out"):
        run(loop.rows, tmp_path / "out", bundle=str(loop.bundle), use_gpu=True)
    assert list(tmp_path.iterdir()) == []
