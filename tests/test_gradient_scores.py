# SPDX-License-Identifier: Apache-2.0
"""What removing parts of blocks scores, against stock autograd, and bundles cut by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from offsite_ray.architectures import feed_forward
from offsite_ray.calibration import GradientScores
from offsite_ray.calibration.text import as_trained, batches_of
from offsite_ray.compression.gradient_preserving import (
    ScoredMatrix,
    channel_scores,
    component_scores,
)
from offsite_ray.compression.low_rank import kept_rank
from offsite_ray.emulator import open_bundle
from offsite_ray.full_model import open_full_model
from tests.calibrations import SIX, batches, documents, packed, read_blocks, summed_loss, tokens_of
from tests.stock import blocks_in, logits_of, stock
from tests.test_input_moments import aware, layers_of
from tests.tiny_models import save_tiny

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from offsite_ray.training.protocols import Batch
    from tests.loops import Loop

FEED_FORWARD = {
    "gpt2": (("mlp.c_fc",), "mlp.c_proj"),
    "opt": (("fc1",), "fc2"),
    "bloom": (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    "llama": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    "qwen3": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    "gemma3_text": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    "gpt_neox": (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    "phi3": None,  # up and gate are one matrix
    "mixtral": None,  # experts; what is left is attention
}
PATHS = {"gpt2": "transformer.h", "bloom": "transformer.h", "opt": "model.decoder.layers"}


def scored_by_hand(model: Any, index: int, given: list[Batch]) -> dict[str, ScoredMatrix]:
    """Return what stock autograd says of a block's linear layers, of one document at a time."""
    layers = layers_of(blocks_in(model)[index])
    caught: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():

        def keep(_module: Any, args: Any, output: Any, name: str = name) -> None:
            output.retain_grad()
            caught[name] = (args[0].detach().flatten(0, -2), output)

        layer.register_forward_hook(keep)
    sums: dict[str, list[Tensor]] = {}
    for tokens, labels in (pair for batch in given for pair in documents(batch)):
        model.zero_grad()
        torch.autograd.backward(summed_loss(model, tokens, labels))
        for name, (inputs, output) in caught.items():
            assert output.grad is not None
            gradient = output.grad.flatten(0, -2)
            weight = layers[name].weight
            own = weight.grad.T if isinstance(layers[name], Conv1D) else weight.grad
            new = [inputs.T @ inputs, gradient.T @ gradient, own.clone()]
            sums[name] = [a + b for a, b in zip(sums.get(name, [0, 0, 0]), new, strict=True)]
    found = {}
    count = sum(batch["input_ids"].numel() for batch in given)
    for name, (inputs, outputs, own) in sums.items():
        weight = layers[name].weight.detach()
        found[name] = ScoredMatrix(
            weight=weight.T.contiguous() if isinstance(layers[name], Conv1D) else weight,
            inputs=inputs / count,
            outputs=outputs / count,
            gradient=own / count,
        )
    return found


@pytest.mark.parametrize("family", FEED_FORWARD)
def test_the_feed_forward_is_found(tmp_path: Path, family: str) -> None:
    heads: dict[str, Any] = {"num_key_value_heads": 4} if family == "mixtral" else {}
    model = stock(save_tiny(family, tmp_path / "model", **heads))
    found = feed_forward(blocks_in(model)[0])
    expected = FEED_FORWARD[family]
    assert (found and (tuple(sorted(found[0])), found[1])) == expected


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("family", SIX)
def test_the_scores_are_those_of_stock_gradients(
    tmp_path: Path, family: str, several: bool
) -> None:
    model, tokens = save_tiny(family, tmp_path / "model"), tokens_of(4)
    full = open_full_model(model)
    given = batches_of(as_trained(packed(tokens), full)) if several else batches(tokens, 3)
    found = GradientScores(full, given, [1, 5], tmp_path / "kept")
    ups, down = FEED_FORWARD[family]  # type: ignore[misc]
    for index in (1, 5):
        matrices = scored_by_hand(stock(model), index, given)
        channels = channel_scores([matrices[up] for up in ups], matrices[down])
        for layer, matrix in matrices.items():
            said = found.of(f"{PATHS.get(family, 'model.layers')}.{index}.{layer}.weight")
            inner = layer in (*ups, down)
            scores = said.channels if inner else said.components
            assert scores is not None
            expected = channels if inner else component_scores(matrix)
            torch.testing.assert_close(scores.curvature, expected.curvature, rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(scores.slope, expected.slope, rtol=1e-3, atol=1e-6)
            assert (said.components is None) is inner
            assert said.channel_axis == int(layer == down)
            assert said.inputs is None


@pytest.mark.parametrize("family", SIX)
def test_components_go_in_attention_and_channels_in_the_feed_forward(
    loop: Loop, tmp_path: Path, family: str
) -> None:
    model = save_tiny(family, tmp_path / "model")
    text = "gradient_preserving:0.5:1:0"
    assert aware(model, loop.text, tmp_path / "bundle", compress=text) == []
    recipe = open_bundle(tmp_path / "bundle").manifest.recipe["compression"]
    assert recipe["steps"][0]["inner_privacy"] == 0.0
    assert recipe["calibration"]["num_sequences"] == 8
    ups, down = FEED_FORWARD[family]  # type: ignore[misc]
    before, after = stock(model), stock(tmp_path / "bundle")
    for place, index in ((1, 1), (2, 4)):
        old, new = (
            {
                name: layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
                for name, layer in layers_of(blocks_in(m)[i]).items()
            }
            for m, i in ((before, index), (after, place))
        )
        removed = (new[down] == 0).all(0)
        assert int(removed.sum()) == len(removed) // 2
        assert torch.equal(new[down][:, ~removed], old[down][:, ~removed])
        for up in ups:
            assert bool((new[up][removed] == 0).all())
            assert torch.equal(new[up][~removed], old[up][~removed])
        for name in old.keys() - {*ups, down}:
            rank = int(torch.linalg.matrix_rank(new[name], rtol=1e-4))
            assert rank == kept_rank(old[name], 0.5)
    packed = {"compress": "gradient_preserving:0.5:1+quantize:8"}
    assert any("unpack" in line for line in aware(model, loop.text, tmp_path / "packed", **packed))


def test_a_block_is_read_once_forward_and_once_backward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, given = open_full_model(save_tiny("llama", tmp_path / "model")), batches(tokens_of(4))
    blocks = read_blocks(monkeypatch)
    together = GradientScores(full, given, [2, 4, 3], tmp_path / "together")
    assert blocks == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2]
    for index in (2, 3, 4):
        alone = GradientScores(full, given, [index], None)
        for layer in ("self_attn.q_proj", "mlp.up_proj"):
            name = f"model.layers.{index}.{layer}.weight"
            said = [each.of(name) for each in (together, alone)]
            scores = [each.components or each.channels for each in said]
            assert scores[0] is not None
            assert scores[1] is not None
            assert torch.equal(scores[0].curvature, scores[1].curvature)
            assert torch.equal(scores[0].slope, scores[1].slope)


def test_scores_are_kept(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    logits = []
    for number, text in enumerate(("gradient_preserving:0.5:0", "gradient_preserving:0.5:1000")):
        aware(loop.model, loop.text, tmp_path / str(number), compress=text)
        logits.append(logits_of(stock(tmp_path / str(number))))
        monkeypatch.setattr("offsite_ray.calibration.gradients.BlockwiseModel", None)
    assert not torch.equal(*logits), "the privacy decides, on the same scores"
    (folder,) = (tmp_path / "cache/offsite_ray/calibration").glob("[!.]*")
    assert sorted(path.name for path in folder.iterdir()) == [
        "block-00001.safetensors",
        "block-00004.safetensors",
    ]


def test_a_fused_feed_forward_is_cut_to_its_rank(loop: Loop, tmp_path: Path) -> None:
    model = save_tiny("phi3", tmp_path / "model")
    assert aware(model, loop.text, tmp_path / "bundle", compress="gradient_preserving:0.5:1") == []
    for layer in layers_of(blocks_in(stock(tmp_path / "bundle"))[1]).values():
        rank = int(torch.linalg.matrix_rank(layer.weight.data, rtol=1e-4))
        assert rank == kept_rank(layer.weight, 0.5)
