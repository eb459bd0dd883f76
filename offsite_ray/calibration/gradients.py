# SPDX-License-Identifier: Apache-2.0
"""What removing parts of blocks does to gradients and to the loss, for compressions that ask.

The full model is in memory, and runs forward and backward once for as many blocks as have moments
of 2 GiB together, or for each. What is kept, on disk, is a few numbers for each singular component
and each inner channel.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from offsite_ray.architectures import (
    feed_forward,
    get_blocks,
    linear_layers,
    load_model,
    stored_alone,
)
from offsite_ray.bundle import TensorDirectory, atomic_file, specs, write_file
from offsite_ray.calibration.files import block_files
from offsite_ray.calibration.text import inputs_of
from offsite_ray.compression import MatrixStatistics
from offsite_ray.compression.gradient_preserving import (
    ScoredMatrix,
    Scores,
    channel_scores,
    component_scores,
)
from offsite_ray.training.batches import sum_cross_entropy

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from offsite_ray.full_model import FullModel
    from offsite_ray.training.protocols import Batch

_MOMENT_BYTES = 2 * 2**30
"""Of the moments that are in memory at once, unless those of one block are more."""

_COMPONENTS, _ROWS, _COLUMNS = "components", "rows", "columns"
"""What the scores of a matrix are of."""


class GradientScores:
    """The scores of matrices by their names on disk; see :mod:`.gradient_preserving`."""

    def __init__(
        self,
        full: FullModel,
        batches: Sequence[Batch],
        blocks: Collection[int],
        folder: Path | None,
    ) -> None:
        """Run sequences through the full model, as far as the scores are not there yet.

        Args:
            full: The full model, which fits into memory.
            batches: Rows of text, nothing of it padding.
            blocks: Those whose matrices are wanted.
            folder: Where the scores are kept and looked for; None: as long as this object is.
        """
        files = block_files(self, blocks, folder, partial(_write, full, batches))
        self._found: dict[str, MatrixStatistics] = {}
        for file in files:
            self._found |= _read(file)

    def __contains__(self, name: str) -> bool:
        """Return whether a weight has scores."""
        return name in self._found

    def of(self, name: str) -> MatrixStatistics:
        """Return what is said of a weight; nothing, where it has no scores."""
        return self._found.get(name, MatrixStatistics())


def _read(file: Path) -> dict[str, MatrixStatistics]:
    saved = TensorDirectory([file])
    found = {}
    for tensor in saved.tensors:
        kind, name = tensor.split("|")
        scores = Scores(*saved.read(tensor))
        found[name] = (
            MatrixStatistics(components=scores)
            if kind == _COMPONENTS
            else MatrixStatistics(channels=scores, channel_axis=int(kind == _COLUMNS))
        )
    return found


def _write(full: FullModel, batches: Sequence[Batch], files: Mapping[int, Path]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load_model(full.path, device=device)
    model.requires_grad_(False)
    on_disk = stored_alone(full.config, full.arch, full.weights.tensors)
    blocks = get_blocks(model, full.arch)
    at_once = max(1, _MOMENT_BYTES // max(1, _moment_bytes(blocks[min(files)])))
    for start in range(0, len(files), at_once):
        indices = sorted(files)[start : start + at_once]
        scored = _scored(model, {index: linear_layers(blocks[index]) for index in indices}, batches)
        for index, matrices in scored.items():
            prefix = f"{full.arch.family.blocks}.{index}."
            names = {path: on_disk.get(f"{prefix}{path}.weight") for path in matrices}
            found = {
                f"{kind}|{names[path]}": torch.stack([scores.curvature, scores.slope])
                for path, (kind, scores) in _scores(matrices, feed_forward(blocks[index])).items()
                if names[path] is not None
            }
            with atomic_file(files[index]) as tmp:
                write_file(tmp, specs(found))


def _moment_bytes(block: nn.Module) -> int:
    """Return the bytes of the moments and gradients of a block's linear layers."""
    shapes = (layer.get_parameter("weight").shape for layer in linear_layers(block).values())
    return sum(4 * (rows**2 + columns**2 + rows * columns) for rows, columns in shapes)


def _scores(
    matrices: Mapping[str, ScoredMatrix], inner: tuple[tuple[str, ...], str] | None
) -> dict[str, tuple[str, Scores]]:
    """Return what the scores of each matrix are of, and the scores."""
    ups, down = inner or ((), None)
    found = {
        path: (_COMPONENTS, component_scores(matrix))
        for path, matrix in matrices.items()
        if path not in (*ups, down)
    }
    if down is not None:
        scores = channel_scores([matrices[up] for up in ups], matrices[down])
        found |= dict.fromkeys(ups, (_ROWS, scores)) | {down: (_COLUMNS, scores)}
    return found


def _scored(
    model: Any, layers: Mapping[int, Mapping[str, nn.Module]], batches: Sequence[Batch]
) -> dict[int, dict[str, ScoredMatrix]]:
    """Return the matrices of some blocks' layers with their moments and gradients, per token."""
    sums = {
        index: {path: _Sums(layer) for path, layer in of_block.items()}
        for index, of_block in layers.items()
    }
    for batch in batches:
        with torch.enable_grad():
            logits = model(**inputs_of(batch, model.device), use_cache=False).logits
            labels = batch["labels"].to(model.device)
            torch.autograd.backward(sum_cross_entropy(logits, labels))
    num_tokens = sum(batch["input_ids"].numel() for batch in batches)
    return {
        index: {path: each.result(num_tokens) for path, each in of_block.items()}
        for index, of_block in sums.items()
    }


class _Sums:
    """Sums over tokens of ``a a^T``, ``g g^T`` and ``g a^T`` of a linear layer."""

    def __init__(self, layer: Any) -> None:
        """Listen to a layer of a frozen model."""
        self._layer = layer
        self._sums: list[Tensor] = []
        # That there is a graph from here on; its own gradient is not looked at.
        layer.weight.requires_grad_(True)
        self._handle = layer.register_forward_hook(self._forward)

    def _forward(self, _layer: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        inputs = args[0].detach().flatten(0, -2).float()

        def backward(gradient: Tensor) -> None:
            outputs = gradient.flatten(0, -2).float()
            new = [inputs.T @ inputs, outputs.T @ outputs, outputs.T @ inputs]
            before = self._sums or [torch.zeros_like(each) for each in new]
            self._sums = [a + b for a, b in zip(before, new, strict=True)]

        output.register_hook(backward)

    def result(self, num_tokens: int) -> ScoredMatrix:
        """Return the means, and leave the layer as it was."""
        self._handle.remove()
        weight = self._layer.weight
        weight.requires_grad_(False)
        weight.grad = None
        inputs, outputs, gradient = (each.cpu() / num_tokens for each in self._sums)
        matrix = weight.detach().float().cpu()
        if not isinstance(self._layer, nn.Linear):  # GPT-2's: (in, out)
            matrix = matrix.T.contiguous()
        return ScoredMatrix(weight=matrix, inputs=inputs, outputs=outputs, gradient=gradient)
