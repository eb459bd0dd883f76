# SPDX-License-Identifier: Apache-2.0
"""What removing parts of blocks does to gradients and to the loss, for compressions that ask.

The full model runs forward once, block by block from the disk, and the hidden states before each
block go to a temporary folder; then backward, each block read and run again where it is asked for
its gradients. So in memory are one block with its activations and moments, and of every sequence
the hidden states or their gradient. What is kept, on disk, is a few numbers for each singular
component and each inner channel.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from offsite_ray.architectures import feed_forward, linear_layers, stored_alone
from offsite_ray.bundle import TensorDirectory, atomic_file, specs, storage_errors, write_file
from offsite_ray.calibration.files import block_files
from offsite_ray.calibration.forward import BlockwiseModel
from offsite_ray.compression import MatrixStatistics
from offsite_ray.compression.gradient_preserving import (
    ScoredMatrix,
    Scores,
    channel_scores,
    component_scores,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor

    from offsite_ray.full_model import FullModel
    from offsite_ray.training.protocols import Batch

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
            full: The full model, on disk.
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
    num_tokens = sum(batch["input_ids"].numel() for batch in batches)
    model = BlockwiseModel(full, batches)
    with tempfile.TemporaryDirectory() as folder:
        inputs = _Inputs(Path(folder))
        gradients = _forward(model, range(full.arch.num_blocks), min(files), inputs)
        for index in reversed(range(min(files), full.arch.num_blocks)):
            block = model.block(index)
            layers = linear_layers(block) if index in files else {}
            sums = {path: _Sums(layer) for path, layer in layers.items()}
            for number, gradient in enumerate(gradients):
                hidden = inputs.take(index, number).to(gradient.device).requires_grad_()
                with torch.enable_grad():
                    output = model.run(index, block, number, hidden)
                (gradients[number],) = torch.autograd.grad(output, hidden, gradient)
            if index in files:
                matrices = {path: each.result(num_tokens) for path, each in sums.items()}
                _save(full, index, _scores(matrices, feed_forward(block)), files[index])


def _save(
    full: FullModel, index: int, scores: Mapping[str, tuple[str, Scores]], file: Path
) -> None:
    """Write the scores of a block's matrices, by path in the block, under their names on disk."""
    on_disk = stored_alone(full.config, full.arch, full.weights.tensors)
    prefix = f"{full.arch.family.blocks}.{index}."
    found = {
        f"{kind}|{on_disk[f'{prefix}{path}.weight']}": torch.stack([own.curvature, own.slope])
        for path, (kind, own) in scores.items()
        if f"{prefix}{path}.weight" in on_disk
    }
    with atomic_file(file) as tmp:
        write_file(tmp, specs(found))


class _Inputs:
    """Hidden states before blocks, on disk until they are asked for, once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, index: int, number: int, hidden: Tensor) -> None:
        file = self._file(index, number)
        with storage_errors(file):
            write_file(file, specs({"hidden": hidden.cpu().contiguous()}))

    def take(self, index: int, number: int) -> Tensor:
        file = self._file(index, number)
        hidden = TensorDirectory([file]).read("hidden")
        file.unlink()
        return hidden

    def _file(self, index: int, number: int) -> Path:
        return self._folder / f"{index}-{number}.safetensors"


def _forward(model: BlockwiseModel, blocks: range, first: int, inputs: _Inputs) -> list[Tensor]:
    """Return the gradient of each batch's loss by the hidden states behind the last block.

    Args:
        model: The full model at the text.
        blocks: All of its blocks.
        first: From which block on the hidden states before it are kept.
        inputs: What keeps them.
    """
    states = model.begin()
    for index in blocks:
        block = model.block(index)
        for number, hidden in enumerate(states):
            if index >= first:
                inputs.put(index, number, hidden)
            with torch.no_grad():
                states[number] = model.run(index, block, number, hidden)
    for number, hidden in enumerate(states):
        hidden.requires_grad_()
        with torch.enable_grad():
            loss = model.loss(number, hidden)
        (states[number],) = torch.autograd.grad(loss, hidden)
    return states


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


class _Sums:
    """Sums over tokens of ``a a^T``, ``g g^T`` and ``g a^T`` of a linear layer."""

    def __init__(self, layer: Any) -> None:
        """Listen to a layer of a block whose input needs a gradient."""
        self._layer = layer
        self._sums: list[Tensor] = []
        self._handle = layer.register_forward_hook(self._forward)

    def _forward(self, _layer: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        inputs = args[0].detach().flatten(0, -2).float()

        def backward(gradient: Tensor) -> None:
            outputs = gradient.flatten(0, -2).float()
            new = [inputs.T @ inputs, outputs.T @ outputs, outputs.T @ inputs]
            if not self._sums:
                self._sums = new
                return
            for total, each in zip(self._sums, new, strict=True):
                total.add_(each)

        output.register_hook(backward)

    def result(self, num_tokens: int) -> ScoredMatrix:
        """Return the means, and stop listening."""
        self._handle.remove()
        inputs, outputs, gradient = (each.div_(num_tokens).cpu() for each in self._sums)
        matrix = self._layer.weight.detach().float().cpu()
        if not isinstance(self._layer, nn.Linear):  # GPT-2's: (in, out)
            matrix = matrix.T.contiguous()
        return ScoredMatrix(weight=matrix, inputs=inputs, outputs=outputs, gradient=gradient)
