# SPDX-License-Identifier: Apache-2.0
"""Calibration: the full model on a little text, once, and again from the user's cache."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from offsite_ray.architectures import load_tokenizer
from offsite_ray.bundle import digest_plain, fingerprint
from offsite_ray.calibration.files import Kept
from offsite_ray.calibration.gradients import GradientScores
from offsite_ray.calibration.losses import PartialLoss
from offsite_ray.calibration.moments import InputMoments
from offsite_ray.calibration.replacement import (
    HarmonizerTraining,
    Replacement,
    learn_replacement,
)
from offsite_ray.calibration.signals import BlockSignals, block_signals
from offsite_ray.calibration.text import as_trained, batches_of, draw_rows
from offsite_ray.results import to_plain
from offsite_ray.training.sources import prepared_for

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor

    from offsite_ray.architectures import Notice
    from offsite_ray.compression import Need
    from offsite_ray.config import CompressConfig
    from offsite_ray.full_model import FullModel

_VERSION = 2
"""Of what the cache holds."""

_SOURCES: dict[Need, type[InputMoments] | type[GradientScores]] = {
    "inputs": InputMoments,
    "gradients": GradientScores,
}


class Calibration:
    """What the full model says of its blocks on a text; each thing computed when it is asked."""

    def __init__(
        self,
        full: FullModel,
        rows: Sequence[Mapping[str, Tensor]],
        data: str | None,
        training: HarmonizerTraining,
    ) -> None:
        """Take the text.

        Args:
            full: The full model, on disk.
            rows: Of prepared data, nothing of it padding.
            data: Digest of the prepared data that the rows are of.
            training: How harmonizers are trained, if somebody asks for them.
        """
        self._full = full
        self._rows = as_trained(rows, full)
        self._training = training
        self._batches = batches_of(self._rows)
        seq_len = len(rows[0]["input_ids"])
        self.recipe = {"data": data, "num_sequences": len(rows), "seq_len": seq_len}
        self._kept = Kept(
            digest_plain(
                {
                    "version": _VERSION,
                    "model": to_plain(fingerprint(full.path, full.weights, {})),
                    "batches": [{n: t.tolist() for n, t in b.items()} for b in self._batches],
                }
            )
        )
        self._known: dict[tuple[int, ...], float] = {}
        self._learnt: dict[str, Replacement] = {}

    def influence(self, block: int) -> float:
        """Return how much a block changes the hidden states; see :class:`BlockSignals`."""
        return self._signals.influence(block)

    def distance(self, first: int, count: int) -> float:
        """Return the angular distance across some blocks; see :class:`BlockSignals`."""
        return self._signals.distance(first, count)

    def alignment(self, a: int, b: int) -> float:
        """Return the linear CKA of what two blocks return; see :class:`BlockSignals`."""
        return self._signals.alignment(a, b)

    def loss(self, dropped: Collection[int]) -> float:
        """Return the loss without some of the blocks; see :class:`PartialLoss`."""
        key = tuple(sorted(dropped))
        if key not in self._known:
            name = ",".join(map(str, key))
            self._known[key] = self._kept.number(
                "-losses", name, lambda: self._partial_loss([*dropped])
            )
        return self._known[key]

    def scores(self, middle: Sequence[int], num_kept: int) -> Mapping[int, float]:
        """Return the learnt score of each block; see :mod:`.replacement`."""
        return self.replacement(middle, num_kept).scores

    def replacement(self, middle: Sequence[int], num_kept: int) -> Replacement:
        """Return the scores, and the harmonizers of the blocks that are dropped by them."""
        request = {"training": to_plain(self._training), "middle": [*middle], "kept": num_kept}
        key = digest_plain(request)

        def learn() -> dict[str, Tensor]:
            learnt = learn_replacement(self._full, self._rows, middle, num_kept, self._training)
            return learnt.tensors()

        if key not in self._learnt:
            tensors = self._kept.tensors(f"-replace-{key}", learn)
            self._learnt[key] = Replacement.of(middle, tensors)
        return self._learnt[key]

    def statistics(self, need: Need, blocks: Collection[int]) -> InputMoments | GradientScores:
        """Return what there is to say of the matrices of some blocks."""
        return _SOURCES[need](self._full, self._batches, blocks, self._kept.folder(f"-{need}"))

    @cached_property
    def _signals(self) -> BlockSignals:
        def signals() -> dict[str, Tensor]:
            found = block_signals(self._full, self._batches)
            return {name: getattr(found, name) for name in BlockSignals.__slots__}

        return BlockSignals(**self._kept.tensors("", signals))

    @cached_property
    def _partial_loss(self) -> PartialLoss:
        return PartialLoss(self._full, self._batches)


def calibrate(full: FullModel, config: CompressConfig, notice: Notice | None) -> Calibration:
    """Return the calibration of a full model on the text of a configuration.

    Raises:
        DataError: The text cannot be read, or makes no whole row.
        ConfigError: The model has fewer positions than a row.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = prepared_for(
            config.calibration,
            full.path,
            full.config,
            config.calibration_seq_len,
            Path(folder),
            notice,
        )
        pad = int(load_tokenizer(full.path).pad_token_id or 0)
        rows = draw_rows(data.path, config.calibration_sequences, config.seed, pad)
        training = HarmonizerTraining(
            rank=config.harmonizer_rank, steps=config.harmonizer_steps, seed=config.seed
        )
        return Calibration(full, rows, data.digest, training)
