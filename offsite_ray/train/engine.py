# SPDX-License-Identifier: Apache-2.0
"""The engine of a Ray Train worker: DeepSpeed ZeRO, stages 0 to 3, with or without offloading.

Source: Rajbhandari et al., arXiv 1910.02054 (ZeRO), and arXiv 2101.06840 (offloading).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.train.extension import build_extension
from offsite_ray.training import adamw
from offsite_ray.training.engine import optimizer_fragments, restore_optimizer, steps_done
from offsite_ray.training.fragments import KINDS, MOMENTS, PARAMETER, Fragment

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from torch import Tensor

    from offsite_ray.config import TrainingConfig
    from offsite_ray.training import TrainingTask
    from offsite_ray.training.fragments import Read
    from offsite_ray.training.protocols import Batch


def deepspeed_config(config: TrainingConfig, world_size: int, *, gpu: bool) -> dict[str, Any]:
    """Return DeepSpeed's settings; the loop accumulates and weights gradients itself."""
    micro = config.micro_batch_size or config.batch_size // world_size
    own = config.batch_size // world_size
    host = {"device": "cpu", "pin_memory": gpu}
    offload = {
        "none": {},
        "optimizer": {"offload_optimizer": host},
        "all": {"offload_optimizer": host, "offload_param": host},
    }
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": -(-own // micro),
        # Stage 0 tells nobody the norm it clips by: there the engine does it.
        "gradient_clipping": config.max_grad_norm if config.zero_stage > 0 else 0.0,
        # Stage 0 has no float32 masters of its own: there the loop's autocast does the same.
        "bf16": {"enabled": config.dtype == "bf16" and config.zero_stage > 0},
        "zero_optimization": {
            "stage": config.zero_stage,
            "stage3_param_persistence_threshold": 0,
            **offload[config.offload],
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    """Training on one of several workers, with DeepSpeed ZeRO stage 0 to 3."""

    copies = True

    def __init__(self, task: TrainingTask, config: TrainingConfig) -> None:
        """Build the task's module and DeepSpeed's engine around it."""
        import deepspeed
        import torch.distributed as dist

        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        gpu = dist.get_backend() == "nccl"
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        )
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if not gpu:
            build_extension()
        settings = deepspeed_config(config, self.world_size, gpu=gpu)
        with _partitioned_loading(settings):
            module = task.build(self.device)
        self._trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.shapes = {n: list(getattr(p, "ds_shape", p.shape)) for n, p in self._trained.items()}
        """Trained parameter to its shape."""
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=adamw(module, config), config=settings
        )
        self._parts = _PARTS[config.zero_stage](
            self._trained, self._optimizer, self.rank, self.world_size
        )
        self._autocast = config.dtype == "bf16" and not settings["bf16"]["enabled"]
        self._max_norm = config.max_grad_norm if config.zero_stage == 0 else None
        self._micro_batches = settings["gradient_accumulation_steps"]
        self._done = 0
        self.reduce([0.0])  # a barrier: every worker has opened what the others share
        _unlink_shared_memory(self.rank)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the parts of the loss, summed over the batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            parts: dict[str, Tensor] = self._engine(**batch)
        return parts

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a share of the global loss.

        DeepSpeed averages over workers, where the loop's shares are to be summed.
        """
        self._done += 1
        self._engine.set_gradient_accumulation_boundary(self._done == self._micro_batches)
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip and apply the gradient; return its norm before.

        A norm that is no number: stages 1 to 3 have skipped the step, stage 0 has not.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = None
        if self._max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(list(self._trained.values()), self._max_norm)
        self._engine.step()
        self._done = 0
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def reduce(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all workers."""
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        found: list[float] = tensor.tolist()
        return found

    def fragments(self, kinds: Collection[str] = KINDS) -> list[Fragment]:
        """Return a copy of what this worker holds of the masters and their moments."""
        live: Iterator[Fragment] = self._parts.fragments()
        return [_copy(fragment) for fragment in live if fragment.kind in kinds]

    def restore(self, read: Read, steps: int) -> None:
        """Go on from fragments, whoever wrote them, with ``steps`` done."""
        self._parts.restore(read, steps)


class _Replicated:
    """Stage 0: every worker holds everything, so they share the writing."""

    def __init__(self, trained: dict[str, Any], optimizer: Any, rank: int, world_size: int) -> None:
        self._trained, self._optimizer = trained, optimizer
        self._own = dict(list(trained.items())[rank::world_size])

    def fragments(self) -> Iterator[Fragment]:
        yield from optimizer_fragments(self._own, self._optimizer)

    def restore(self, read: Read, steps: int) -> None:
        restore_optimizer(self._trained, self._optimizer, read, steps)


class _CutInGroups:
    """Stages 1 and 2: the masters of a group lie end to end, and each worker has a stretch."""

    def __init__(self, trained: dict[str, Any], optimizer: Any, rank: int, world_size: int) -> None:
        self._trained, self._optimizer = trained, optimizer.optimizer

    def fragments(self) -> Iterator[Fragment]:
        for name, parameter in self._trained.items():
            piece = parameter._hp_mapping
            if piece is not None:
                start = piece.lp_fragment_address.start
                places = {PARAMETER: piece.hp_fragment, **self._moments(piece)}
                for kind, values in places.items():
                    yield Fragment(kind=kind, name=name, start=start, values=values)

    @torch.no_grad()
    def restore(self, read: Read, steps: int) -> None:
        for group in self._optimizer.param_groups:
            for flat in group["params"]:
                self._optimizer.state[flat] = _fresh(flat, steps)
        for name, parameter in self._trained.items():
            parameter.copy_(read(PARAMETER, name, 0, parameter.numel()).view_as(parameter))
            piece = parameter._hp_mapping
            if piece is not None:
                start = piece.lp_fragment_address.start
                places = {PARAMETER: piece.hp_fragment, **self._moments(piece)}
                for kind, values in places.items():
                    values.copy_(read(kind, name, start, values.numel()))

    def _moments(self, piece: Any) -> dict[str, Tensor]:
        (flat,) = self._optimizer.param_groups[piece.param_group_index]["params"]
        state = self._optimizer.state.get(flat, {})
        begin, numel = piece.hp_fragment_address.start, piece.hp_fragment_address.numel
        return {m: state[m].narrow(0, begin, numel) for m in MOMENTS if m in state}


class _CutInTensors:
    """Stage 3: each worker has its stretch of every tensor, the last one padded."""

    def __init__(self, trained: dict[str, Any], optimizer: Any, rank: int, world_size: int) -> None:
        self._trained, self._zero, self._rank = trained, optimizer, rank

    def fragments(self) -> Iterator[Fragment]:
        for name, parameter in self._trained.items():
            start, numel = self._stretch(parameter)
            if numel:
                for kind, values in self._local(parameter).items():
                    own = values.narrow(0, 0, numel)
                    yield Fragment(kind=kind, name=name, start=start, values=own)

    @torch.no_grad()
    def restore(self, read: Read, steps: int) -> None:
        for flat in self._zero.fp32_partitioned_groups_flat:
            self._zero.optimizer.state[flat] = _fresh(flat, steps)
        for name, parameter in self._trained.items():
            start, numel = self._stretch(parameter)
            if numel:
                for kind, values in self._local(parameter).items():
                    values.narrow(0, 0, numel).copy_(read(kind, name, start, numel))
                master = read(PARAMETER, name, start, numel)
                parameter.ds_tensor.view(-1).narrow(0, 0, numel).copy_(master)

    def _stretch(self, parameter: Any) -> tuple[int, int]:
        size = parameter.ds_tensor.numel()
        start = min(self._rank * size, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)

    def _local(self, parameter: Any) -> dict[str, Tensor]:
        group, begin, numel = self._zero.grad_position[self._zero.get_param_id(parameter)]
        flat = self._zero.fp32_partitioned_groups_flat[group]
        state = self._zero.optimizer.state.get(flat, {})
        places = {PARAMETER: flat, **{m: state[m] for m in MOMENTS if m in state}}
        return {kind: tensor.narrow(0, begin, numel) for kind, tensor in places.items()}


_PARTS: dict[int, Any] = {0: _Replicated, 1: _CutInGroups, 2: _CutInGroups, 3: _CutInTensors}
"""ZeRO stage to where DeepSpeed has laid what a worker holds."""


def _unlink_shared_memory(rank: int) -> None:
    """Take the name from the buffer that DeepSpeed shares between CPU workers, and never frees.

    Who has it open keeps it; it goes with the last of them, however they end.
    """
    place = f"{os.environ.get('MASTER_ADDR')}_{os.environ.get('MASTER_PORT')}_{rank}"
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{place}"):
        path.unlink(missing_ok=True)


def _fresh(flat: Tensor, steps: int) -> dict[str, Tensor]:
    return {"step": steps_done(steps, flat), **{m: torch.zeros_like(flat) for m in MOMENTS}}


def _copy(live: Fragment) -> Fragment:
    copied = live.values.detach().flatten().to("cpu", torch.float32, copy=True)
    return dataclasses.replace(live, values=copied)


@contextlib.contextmanager
def _partitioned_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Let transformers cut weights up as it reads them, under ZeRO-3."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    if settings["zero_optimization"]["stage"] != 3:
        yield
        return
    # transformers only keeps a weak reference: the name holds it alive for the block.
    config = HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config
