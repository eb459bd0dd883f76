# SPDX-License-Identifier: Apache-2.0
"""The rows that the full model is shown: drawn from prepared data, as training would see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from offsite_ray.data import IGNORED, all_blocks
from offsite_ray.errors import DataError
from offsite_ray.training import keeps_documents_apart
from offsite_ray.training.batches import collate, num_targets

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from offsite_ray.full_model import FullModel
    from offsite_ray.training.protocols import Batch

_BATCH_TOKENS = 8192
"""Of what goes through a block at once."""


def draw_rows(path: Path, count: int, seed: int, pad: int) -> list[dict[str, Tensor]]:
    """Return ``count`` rows of prepared data drawn by a seed, or all.

    Those that end in padding are left out, and those that predict nothing.

    Args:
        path: The prepared data.
        count: At most so many.
        seed: Of the order in which they are looked at.
        pad: The token of padding.

    Raises:
        DataError: No row is left.
    """
    blocks = all_blocks(path)
    found: list[dict[str, Tensor]] = []
    for index in np.random.default_rng(seed).permutation(len(blocks)):
        row = blocks[int(index)]
        if num_targets([row]) and not _is_padded(row, pad):
            found.append(row)
        if len(found) == count:
            break
    if not found:
        raise DataError(
            f"{path} has no row that text fills to its end; calibrate on running text, or on "
            "shorter rows (--calibration-seq-len)"
        )
    return found


def _is_padded(row: Mapping[str, Tensor], pad: int) -> bool:
    """Return whether the last piece of a row is padding, and not the beginning of a document."""
    begin = int((row["position_ids"] == 0).nonzero()[-1])
    tokens, labels = row["input_ids"][begin:], row["labels"][begin:]
    return bool((labels == IGNORED).all() and (tokens == pad).all())


def as_trained(rows: Sequence[Mapping[str, Tensor]], full: FullModel) -> list[dict[str, Tensor]]:
    """Return rows without positions where these would keep no documents apart in the model."""
    several = "position_ids" in collate(rows, torch.device("cpu"))
    apart = several and keeps_documents_apart(full.config, full.arch, full.weights)
    names = [name for name in rows[0] if apart or name != "position_ids"]
    return [{name: row[name] for name in names} for row in rows]


def batches_of(rows: Sequence[Mapping[str, Tensor]]) -> list[Batch]:
    """Return rows as batches, each of as many as go through a block at once."""
    size = max(1, _BATCH_TOKENS // len(rows[0]["input_ids"]))
    cpu = torch.device("cpu")
    return [collate(rows[first : first + size], cpu) for first in range(0, len(rows), size)]


def inputs_of(batch: Batch, device: torch.device) -> Batch:
    """Return what a model is given of a batch: tokens, and positions if there are any."""
    return {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}


def targets_in(batches: Sequence[Batch]) -> int:
    """Return how many tokens are to be predicted in some batches."""
    return sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
