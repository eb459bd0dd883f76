# SPDX-License-Identifier: Apache-2.0
"""What goes into linear layers, measured block by block, and compression that looks at it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from offsite_ray.calibration import InputMoments, run
from offsite_ray.compression.low_rank import kept_rank, truncate, truncate_whitened
from offsite_ray.config import CompressConfig
from offsite_ray.emulator import compress, open_bundle
from offsite_ray.full_model import open_full_model
from tests.calibrations import SIX, batches, tokens_of
from tests.stock import blocks_in, logits_of, stock
from tests.tiny_models import save_tiny

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from offsite_ray.training.protocols import Batch
    from tests.loops import Loop

BLOCKS = (1, 4)


def layers_of(block: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def stock_inputs(model: Any, index: int, tokens: Tensor) -> dict[str, Tensor]:
    """Return the inputs ``(tokens, in)`` of a block's linear layers, by hooks on a stock model."""
    found: dict[str, Tensor] = {}
    for name, module in layers_of(blocks_in(model)[index]).items():

        def keep(_module: nn.Module, args: Any, name: str = name) -> None:
            found[name] = args[0].flatten(0, -2)

        module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return found


@pytest.mark.parametrize("family", SIX)
def test_the_moments_are_those_of_the_model(tmp_path: Path, family: str) -> None:
    model, tokens = save_tiny(family, tmp_path / "model"), tokens_of()
    found = InputMoments(open_full_model(model), batches(tokens, 4), BLOCKS, tmp_path / "moments")
    assert sorted(path.name for path in (tmp_path / "moments").iterdir()) == [
        "block-00001.safetensors",
        "block-00004.safetensors",
    ]
    path = {"gpt2": "transformer.h", "bloom": "transformer.h", "opt": "model.decoder.layers"}
    for index in BLOCKS:
        for name, inputs in stock_inputs(stock(model), index, tokens).items():
            whole = f"{path.get(family, 'model.layers')}.{index}.{name}.weight"
            moment = found.of(whole).inputs
            assert moment is not None
            torch.testing.assert_close(
                moment, inputs.T @ inputs / tokens.numel(), rtol=1e-4, atol=1e-5
            )
    assert found.of(whole.replace(".4.", ".2.")).inputs is None
    assert whole.replace(".4.", ".2.") not in found


def test_moments_are_kept_and_layers_with_the_same_inputs_share_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = open_full_model(save_tiny("llama", tmp_path / "model"))
    folder = tmp_path / "moments"
    first = InputMoments(full, batches(tokens_of()), [1], folder)
    # into q, k and v; into o; into gate and up; into down
    assert (folder / "block-00001.safetensors").stat().st_size < 4 * (3 * 32**2 + 48**2) + 2000
    alone = InputMoments(full, batches(tokens_of()), [1], None)
    monkeypatch.setattr("offsite_ray.calibration.moments.blockwise_forward", None)
    again = InputMoments(full, [], [1], folder)
    for layer in ("self_attn.v_proj", "mlp.down_proj"):
        name = f"model.layers.1.{layer}.weight"
        moments = [moments.of(name).inputs for moments in (first, again, alone)]
        assert moments[0] is not None
        assert moments[1] is not None
        assert moments[2] is not None
        assert torch.equal(moments[0], moments[1])
        assert torch.equal(moments[0], moments[2])
    with pytest.raises(TypeError):
        InputMoments(full, [], [1, 2], folder)


def aware(model: Path, text: Path, out: Path, **given: Any) -> list[str]:
    """Compress a model; return what the user was told."""
    told: list[str] = []
    config: dict[str, Any] = {
        "model": str(model),
        "plan": "adapter=0,5 emulator=1,4",
        "out": str(out),
        "compress": "low_rank_aware:0.5",
        "calibration": (str(text),),
        "calibration_sequences": 8,
        "calibration_seq_len": 16,
    }
    compress(CompressConfig(**{**config, **given}), told.append)
    return told


@pytest.mark.parametrize("family", SIX)
def test_a_matrix_keeps_what_text_makes_it_compute(loop: Loop, tmp_path: Path, family: str) -> None:
    model = save_tiny(family, tmp_path / "model")
    assert aware(model, loop.text, tmp_path / "bundle") == []
    recipe = open_bundle(tmp_path / "bundle").manifest.recipe["compression"]
    assert recipe["steps"][0]["method"] == "low_rank_aware"
    assert recipe["calibration"]["num_sequences"] == 8
    full = open_full_model(model)
    seen: list[Batch] = []

    def keep(full_model: Any, batches: Any, blocks: Any, folder: Any) -> InputMoments:
        seen.extend(batches)
        return InputMoments(full_model, batches, blocks, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run._SOURCES, "inputs", cast("Any", keep))
        aware(model, loop.text, tmp_path / "again")
    tokens = torch.cat([batch["input_ids"] for batch in seen])
    assert tokens.shape == (8, 16)
    bundle = stock(tmp_path / "bundle")
    for place, index in ((1, 1), (2, 4)):
        inputs = stock_inputs(stock(model), index, tokens)
        before, after = (
            layers_of(blocks_in(m)[i]) for m, i in ((stock(model), index), (bundle, place))
        )
        for name, layer in before.items():
            turned = isinstance(layer, Conv1D)
            was, is_now = (
                m.weight.data.T if turned else m.weight.data for m in (layer, after[name])
            )
            rank = kept_rank(was, 0.5)
            moment = inputs[name].T @ inputs[name] / len(inputs[name])
            expected = truncate_whitened(was.contiguous(), moment, rank)
            torch.testing.assert_close(is_now, expected, rtol=1e-2, atol=2e-3)
            plain = truncate(was.contiguous(), rank)
            errors = [
                float((inputs[name] @ (was - other).T).square().mean()) for other in (is_now, plain)
            ]
            assert errors[0] <= errors[1] * 1.001
    assert full.arch.num_blocks == 6


def test_it_composes_and_takes_copies(loop: Loop, tmp_path: Path) -> None:
    given = {"plan": "1-2-1", "select": "cka_cluster_shared", "compress": "low_rank_aware:0.5"}
    aware(loop.model, loop.text, tmp_path / "bundle", **given)
    bundle = open_bundle(tmp_path / "bundle")
    stored = bundle.manifest.recipe["selection"]["copies_of"]
    model = stock(tmp_path / "bundle")
    for place, index in enumerate(stored):
        same = [other for other, stored_there in enumerate(stored) if stored_there == index]
        for other in set(same) - {0, 5, place}:
            if place not in (0, 5):
                left, right = (blocks_in(model)[i].state_dict() for i in (place, other))
                assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    told = aware(
        loop.model, loop.text, tmp_path / "packed", compress="low_rank_aware:0.5+quantize:8"
    )
    assert any("unpack" in line for line in told)


def test_experts_are_compressed_without_regard_to_inputs_and_it_is_said(
    loop: Loop, tmp_path: Path
) -> None:
    model = save_tiny("mixtral", tmp_path / "model")
    (told,) = aware(model, loop.text, tmp_path / "bundle")
    assert told.startswith("24 matrices, 'model.layers.1.")  # 2 blocks of 4 experts of 3
    assert bool(torch.isfinite(logits_of(stock(tmp_path / "bundle"))).all())
