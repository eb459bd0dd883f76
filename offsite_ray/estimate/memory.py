# SPDX-License-Identifier: Apache-2.0
"""Memory of one worker: what a rehearsed step takes, cut up and moved as ZeRO does.

Sources: Rajbhandari et al., arXiv 1910.02054 (ZeRO); arXiv 2101.06840 (offloading); what DeepSpeed
keeps beside that is read from its code (``runtime/zero``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offsite_ray.config import OFFLOAD_STAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from offsite_ray.config import Offload
    from offsite_ray.rehearsal import Bytes, Rehearsal

_FLOAT32 = 4
_MOMENTS = 2 * _FLOAT32
"""Bytes that AdamW keeps for each trained parameter."""

REDUCE_BUCKET = 5 * 10**8
"""Gradients that DeepSpeed reduces at once, in a buffer of that many elements."""
PREFETCH_BUCKET = 5 * 10**7
"""Parameters that stage 3 fetches ahead of their use."""
REUSE_DISTANCE = 10**9
"""Stage 3 keeps a parameter that is used again before as many others were."""
SUB_GROUP = 10**9
"""Parameters that stage 3 updates at once."""

_HEAP_HOLES = 0.8
"""On a CPU, what glibc's heap has beside the tensors in it, as a share of these.

Freed blocks below 32 MiB stay in the heap, and the next tensor often does not fit into their place.
Measured with glibc 2.36 on OPT with 24 blocks of width 1024, fine-tuned in eight ways.
"""
_HEAP_HOLES_RECOMPUTING = 1.6
"""The same where the forward pass is recomputed, which frees most of what it makes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """How a worker trains."""

    zero_stage: int | None
    """None: in a process of its own, without DeepSpeed."""
    offload: Offload = "none"
    num_workers: int = 1
    itemsize: int = _FLOAT32
    """Bytes of a number in the forward pass: 2 in bf16."""
    num_micro_batches: int = 1
    """Forward passes whose gradients are summed in a step."""
    gpu: bool = True

    @property
    def replicates(self) -> bool:
        """Whether every worker holds everything: float32 masters, and autocast for bf16."""
        return not self.zero_stage

    @property
    def is_possible(self) -> bool:
        """Whether what is to be offloaded can be at this stage."""
        return self.offload == "none" or (self.zero_stage or 0) >= OFFLOAD_STAGES[self.offload]


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one worker at the moment when they are the most."""

    moment: str
    """``backward``, ``reduce`` or ``step``."""
    weights: int
    """What the forward pass computes with."""
    masters: int = 0
    """Float32 copies of what trains, where the forward pass has others."""
    gradients: int = 0
    moments: int = 0
    """Of AdamW."""
    activations: int = 0
    """What the backward pass reads, and what single operations need."""
    buffers: int = 0
    """Of communication, gathered weights, and holes in the heap of a CPU's process."""
    host: int = 0
    """In the host's memory, for this worker; no part of the total."""

    total: int = field(init=False)
    """Everything on the device."""

    def __post_init__(self) -> None:
        """Add up what is on the device."""
        parts = (self.weights, self.masters, self.gradients, self.moments)
        total = sum(parts) + self.activations + self.buffers
        object.__setattr__(self, "total", total)  # frozen for everyone else


def memory_of(rehearsal: Rehearsal, worker: Worker) -> Memory:
    """Return the peak memory of a worker.

    Args:
        rehearsal: Of the module in the form that the worker trains: with ``worker.replicates``
            under autocast, else with everything in the dtype of the forward pass.
        worker: How it trains.
    """
    moments = _STAGES[worker.zero_stage or 0](rehearsal, worker)
    return max(moments, key=lambda memory: memory.total)


def _replicated(rehearsal: Rehearsal, worker: Worker) -> Iterator[Memory]:
    trained = rehearsal.trained
    gradients, alive = trained * _FLOAT32, rehearsal.most
    if worker.num_micro_batches > 1:
        alive = rehearsal.most_others
    fixed = {"weights": rehearsal.weights, "moments": trained * _MOMENTS}
    yield Memory(
        moment="backward",
        gradients=gradients if worker.num_micro_batches > 1 else alive.gradients,
        activations=alive.others,
        buffers=_holes(alive, rehearsal, worker),
        **fixed,
    )
    if worker.zero_stage is not None and worker.num_workers > 1:
        bucket = min(trained, REDUCE_BUCKET) * _FLOAT32
        yield Memory(moment="reduce", gradients=gradients, buffers=bucket, **fixed)
    yield Memory(moment="step", gradients=gradients, **fixed)


def _cut_optimizer(rehearsal: Rehearsal, worker: Worker) -> Iterator[Memory]:
    """Stages 1 and 2: every worker has all weights, and its share of the optimizer."""
    trained, size = rehearsal.trained, worker.itemsize
    own = -(-trained // worker.num_workers)
    fixed = {"weights": rehearsal.weights, **_optimizer(own, worker)}
    on_device = 0 if worker.offload != "none" else own * size
    bucket = _bucket(trained, worker)
    if worker.zero_stage == 1:
        alive = rehearsal.most if worker.num_micro_batches == 1 else rehearsal.most_others
        kept = alive.gradients if worker.num_micro_batches == 1 else trained * size
        yield Memory(moment="reduce", gradients=trained * size + on_device, buffers=bucket, **fixed)
        during = {"gradients": kept, "buffers": 0}
    else:
        alive = rehearsal.most_others
        during = {"gradients": on_device, "buffers": bucket}
    during["buffers"] += _holes(alive, rehearsal, worker)
    yield Memory(moment="backward", activations=alive.others, **during, **fixed)
    yield Memory(moment="step", gradients=on_device + _step_copies(own, worker), **fixed)


def _cut_weights(rehearsal: Rehearsal, worker: Worker) -> Iterator[Memory]:
    """Stage 3: every worker has its share of everything, and gathers weights as it needs them."""
    size, num = worker.itemsize, worker.num_workers
    own, all_of_it = -(-rehearsal.trained // num), rehearsal.trained + rehearsal.frozen
    weights = -(-all_of_it // num) * size
    moved = worker.offload == "all"
    fixed = {"weights": 0 if moved else weights, **_optimizer(own, worker)}
    fixed["host"] += weights if moved else 0
    gradients = 0 if worker.offload != "none" else own * size
    bucket = _bucket(rehearsal.trained, worker)
    # Reduced as one tensor that is made of the bucket's.
    joined = 0 if num == 1 else min(rehearsal.trained, REDUCE_BUCKET) * size
    alive = rehearsal.most_others
    yield Memory(
        moment="backward",
        gradients=gradients,
        activations=alive.others,
        buffers=bucket + joined + _gathered(rehearsal, worker) + _holes(alive, rehearsal, worker),
        **fixed,
    )
    copies = _step_copies(min(own, SUB_GROUP), worker)
    yield Memory(moment="step", gradients=gradients + copies, buffers=bucket, **fixed)


_STAGES: dict[int, Callable[[Rehearsal, Worker], Iterator[Memory]]] = {
    0: _replicated,
    1: _cut_optimizer,
    2: _cut_optimizer,
    3: _cut_weights,
}
"""ZeRO stage to what a worker has at each moment that may be its peak."""


def _optimizer(own: int, worker: Worker) -> dict[str, int]:
    """Return where the masters and moments of ``own`` parameters are."""
    masters, moments = own * _FLOAT32, own * _MOMENTS
    if worker.offload == "none":
        return {"masters": masters, "moments": moments, "host": 0}
    # Beside them the host has float32 gradients, and what goes back to the device.
    return {"masters": 0, "moments": 0, "host": masters + moments + own * (4 + worker.itemsize)}


def _step_copies(own: int, worker: Worker) -> int:
    """Return the bytes of what is made of the gradients of ``own`` parameters for the optimizer.

    They are joined into one tensor, and that is made float32 before it is let go.
    """
    if worker.offload != "none":
        return 0
    return own * (worker.itemsize + (_FLOAT32 if worker.itemsize != _FLOAT32 else 0))


def _bucket(trained: int, worker: Worker) -> int:
    """Return the bytes of DeepSpeed's buffer; a CPU has only those that are ever written to."""
    elements = REDUCE_BUCKET if worker.gpu else min(trained, REDUCE_BUCKET)
    return elements * worker.itemsize


def _gathered(rehearsal: Rehearsal, worker: Worker) -> int:
    """Return the bytes of weights that stage 3 has gathered.

    Those of the last blocks stay from the forward to the backward pass: half the distance each way.
    """
    if worker.num_workers == 1 and worker.offload != "all":
        return 0  # used where they lie
    kept = REUSE_DISTANCE // 2 + PREFETCH_BUCKET + rehearsal.largest
    everything = rehearsal.trained + rehearsal.frozen
    # What is being fetched is there in pieces, and joined.
    return (min(everything, kept) + min(everything, PREFETCH_BUCKET)) * worker.itemsize


def _holes(alive: Bytes, rehearsal: Rehearsal, worker: Worker) -> int:
    """Return what a CPU's process keeps beside the tensors that are alive at the peak."""
    if worker.gpu:
        return 0
    share = _HEAP_HOLES_RECOMPUTING if rehearsal.operations.recomputed else _HEAP_HOLES
    kept = alive.large_blocks + round((1 + share) * alive.small_blocks)
    return max(0, kept - alive.total)
