# SPDX-License-Identifier: Apache-2.0
"""What a pass of the full model over some text says of its blocks, for whoever selects some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from offsite_ray.calibration.forward import blockwise_forward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from offsite_ray.full_model import FullModel
    from offsite_ray.training.protocols import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSignals:
    """Hidden states of the full model, as far as selection methods need them; all float32."""

    similarity: Tensor
    """``(L,)``: mean cosine, over tokens, of the hidden states before and behind each block."""
    last: Tensor
    """``(L + 1, N, H)``: of the last token of each sequence, before each block and at the end."""
    pooled: Tensor
    """``(L + 1, N, H)``: mean over the tokens, each weighted by its position, of the same."""

    def influence(self, block: int) -> float:
        """Return the block influence ``1 - E[cos(h_i, h_(i+1))]`` (ShortGPT, arXiv 2403.03853)."""
        return 1.0 - float(self.similarity[block])

    def distance(self, first: int, count: int) -> float:
        """Return the angular distance, from 0 to 1, across ``count`` blocks from ``first`` on.

        ``E[arccos(cos(h_l, h_(l+n)))] / pi`` of the last token (Gromov et al., arXiv 2403.17887,
        eq. 7).
        """
        cosine = F.cosine_similarity(self.last[first], self.last[first + count], dim=-1)
        return float(cosine.clamp(-1, 1).arccos().mean()) / torch.pi

    def alignment(self, a: int, b: int) -> float:
        """Return the linear CKA, from 0 to 1, of what two blocks return (CRaSh, arXiv 2310.15477).

        ``HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y))`` of the pooled hidden states, with the centred
        gram matrices over sequences (Kornblith et al., arXiv 1905.00414, eq. 3).
        """
        x, y = _centred_gram(self.pooled[a + 1]), _centred_gram(self.pooled[b + 1])
        scale = float((x * x).sum().sqrt() * (y * y).sum().sqrt())
        return float((x * y).sum()) / scale if scale > 0 else 0.0


def _centred_gram(states: Tensor) -> Tensor:
    """Return ``H K H`` of hidden states ``(N, H)``, as ``(N, N)`` float64."""
    centred = states.double() - states.double().mean(0)
    return centred @ centred.T


def block_signals(full: FullModel, batches: Sequence[Batch]) -> BlockSignals:
    """Return the signals of a full model on some sequences, in one pass.

    Args:
        full: The full model, on disk.
        batches: Rows of text, nothing of it padding.
    """
    num_blocks = full.arch.num_blocks
    cosines = torch.zeros(num_blocks, dtype=torch.float64)
    last: list[list[Tensor]] = [[] for _ in range(num_blocks + 1)]
    pooled: list[list[Tensor]] = [[] for _ in range(num_blocks + 1)]

    def keep(place: int, states: Tensor) -> None:
        last[place].append(states[:, -1].cpu())
        weights = torch.arange(1, states.shape[1] + 1, device=states.device).float()
        mean = torch.einsum("bth,t->bh", states, weights / weights.sum())
        pooled[place].append(mean.cpu())

    def see(index: int, before: Tensor, after: Tensor) -> None:
        before, after = before.float(), after.float()
        cosines[index] += F.cosine_similarity(before, after, dim=-1).double().sum().cpu()
        if index == 0:
            keep(0, before)
        keep(index + 1, after)

    blockwise_forward(full, batches, see)
    num_tokens = sum(batch["input_ids"].numel() for batch in batches)
    return BlockSignals(
        similarity=(cosines / num_tokens).float(),
        last=torch.stack([torch.cat(each) for each in last]),
        pooled=torch.stack([torch.cat(each) for each in pooled]),
    )
