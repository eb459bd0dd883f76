# SPDX-License-Identifier: Apache-2.0
"""Training on a packed bundle: on what it stands for, and what is written afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from offsite_ray.architectures import load_model
from offsite_ray.compression import quantize
from offsite_ray.config import (
    CompressConfig,
    DistillConfig,
    EvaluateConfig,
    FinetuneConfig,
    UnpackConfig,
)
from offsite_ray.distillation import distill
from offsite_ray.emulator import compress, open_bundle, unpack
from offsite_ray.evaluation import evaluate
from offsite_ray.finetuning import finetune
from offsite_ray.training import run_here
from tests.loops import ignore
from tests.stock import logits_of, plug, stock

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loops import Loop

TRAIN: dict[str, Any] = {
    "max_steps": 6,
    "batch_size": 4,
    "seq_len": 32,
    "learning_rate": 3e-3,
    "num_workers": 0,
}


@pytest.fixture(scope="module")
def packed(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "bundle"
    compress(
        CompressConfig(model=str(loop.model), plan="1-2-1", out=str(out), compress="quantize:4")
    )
    return out


def distilled(loop: Loop, bundle: Path, out: Path) -> list[str]:
    """Distil a bundle; return what the user was told."""
    told: list[str] = []
    config = DistillConfig(
        model=str(loop.model), bundle=str(bundle), data=(str(loop.text),), out=str(out), **TRAIN
    )
    result = distill(config, run_here, ignore, told.append)
    assert result.last_losses["loss"] < result.first_losses["loss"]
    return told


def test_a_distilled_packed_bundle_is_packed_again(
    loop: Loop, packed: Path, tmp_path: Path
) -> None:
    told = distilled(loop, packed, tmp_path / "distilled")
    assert any("packed in 4 bits" in line and "rounded" in line for line in told)
    unpack(UnpackConfig(bundle=str(packed), out=str(tmp_path / "unpacked")))
    assert not any(
        "packed" in line for line in distilled(loop, tmp_path / "unpacked", tmp_path / "dense")
    )
    before, after = open_bundle(packed), open_bundle(tmp_path / "distilled")
    dense = open_bundle(tmp_path / "dense")
    assert after.weights.nbytes == before.weights.nbytes < dense.weights.nbytes
    assert after.manifest.recipe["distillation"]["rounded_to"]["bits"] == 4
    assert "rounded_to" not in dense.manifest.recipe["distillation"]
    emulator = {before.plan.kept.index(index) for index in before.plan.emulator}
    for name in before.weights.tensors:
        was, trained = before.weights.read(name), dense.weights.read(name)
        assert torch.equal(was, trained) == (before.arch.block_of(name) not in emulator)
        is_matrix = before.arch.block_of(name) in emulator and trained.ndim == 2
        # Conv1D: (in, out)
        rounded = quantize(trained.T.contiguous(), 4).dequantized().T if is_matrix else trained
        assert torch.equal(after.weights.read(name), rounded), name
    assert not torch.equal(*(logits_of(load_model(b.path)) for b in (before, after)))


def test_the_data_owner_trains_on_a_packed_bundle(loop: Loop, packed: Path, tmp_path: Path) -> None:
    adapter, plugged = tmp_path / "adapter", tmp_path / "plugged"
    config = FinetuneConfig(bundle=str(packed), data=(str(loop.text),), out=str(adapter), **TRAIN)
    result = finetune(config, run_here, ignore)
    assert result.first_loss is not None
    assert result.last_loss is not None
    assert result.last_loss < result.first_loss
    plug(loop.model, adapter, plugged)
    measured = evaluate(
        EvaluateConfig(
            model=str(loop.model),
            bundle=str(packed),
            adapter=str(adapter),
            text=(str(loop.text),),
            seq_len=32,
        )
    ).settings
    losses = {
        name: setting.perplexity.nats_per_token
        for name, setting in measured.items()
        if setting is not None and setting.perplexity is not None
    }
    assert losses["emulator_fine_tuned"] < losses["emulator_zero_shot"]
    assert not torch.equal(logits_of(stock(plugged)), logits_of(stock(loop.model)))
