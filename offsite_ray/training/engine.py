# SPDX-License-Identifier: Apache-2.0
"""Training in this process: the optimizer, and the engine around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.errors import ConfigError
from offsite_ray.training.devices import give_back
from offsite_ray.training.fragments import MOMENTS, PARAMETER, Fragment
from offsite_ray.training.loop import training_loop
from offsite_ray.training.protocols import TrainingOutcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from offsite_ray.config import TrainingConfig
    from offsite_ray.results import Report
    from offsite_ray.training.fragments import Read
    from offsite_ray.training.protocols import Batch, TrainingTask


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return what trains in two groups: matrices, which are decayed, and vectors, which are not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # Under ZeRO-3 a parameter is a flat piece; its shape is in ds_shape.
    ndim = {id(p): len(getattr(p, "ds_shape", p.shape)) for p in trained}
    matrices = [p for p in trained if ndim[id(p)] >= 2]
    vectors = [p for p in trained if ndim[id(p)] < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(module: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Return torch's AdamW over what trains (Loshchilov and Hutter, arXiv 1711.05101)."""
    return torch.optim.AdamW(
        parameter_groups(module, config.weight_decay),
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )


def optimizer_fragments(
    trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> list[Fragment]:
    """Return parameters and their moments, whole, as fragments on the CPU."""
    found = []
    for name, parameter in trained.items():
        state = optimizer.state.get(parameter, {})
        kinds = {PARAMETER: parameter.detach(), **{m: state[m] for m in MOMENTS if m in state}}
        for kind, tensor in kinds.items():
            found.append(Fragment(kind=kind, name=name, start=0, values=tensor.cpu().flatten()))
    return found


@torch.no_grad()
def restore_optimizer(
    trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, read: Read, steps: int
) -> None:
    """Set parameters and their moments to what fragments hold."""
    for name, parameter in trained.items():
        parameter.copy_(read(PARAMETER, name, 0, parameter.numel()).view_as(parameter))
        moments = {
            moment: read(moment, name, 0, parameter.numel()).view_as(parameter).to(parameter.device)
            for moment in MOMENTS
        }
        optimizer.state[parameter] = {"step": steps_done(steps, parameter), **moments}


def steps_done(steps: int, like: Tensor) -> Tensor:
    """Return AdamW's count of steps, where its fused form wants it."""
    return torch.tensor(float(steps), device=like.device)


class TorchEngine:
    """Training in this process, on one device."""

    rank = 0
    world_size = 1

    def __init__(self, task: TrainingTask, config: TrainingConfig) -> None:
        """Build the task's module and its optimizer."""
        gpu = torch.cuda.is_available() if config.use_gpu is None else config.use_gpu
        if gpu and not torch.cuda.is_available():
            raise ConfigError("--use-gpu was given and torch sees no GPU here; leave it out")
        self.device = torch.device("cuda" if gpu else "cpu")
        self._module = task.build(self.device)
        give_back()  # what the task's data and the build have left
        self.trained = {n: p for n, p in self._module.named_parameters() if p.requires_grad}
        """What trains, by its name in the task's module."""
        self._optimizer = adamw(self._module, config)
        self._max_norm = config.max_grad_norm
        self._bf16 = config.dtype == "bf16"
        self.copies = self.device.type != "cpu"

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the parts of the loss, summed over the batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            parts: dict[str, Tensor] = self._module(**batch)
        return parts

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a share of the loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> float:
        """Clip and apply the gradient; return its norm before."""
        norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), self._max_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def reduce(self, values: Sequence[float]) -> list[float]:
        """Return the values: there is one worker."""
        return list(values)

    def fragments(self) -> list[Fragment]:
        """Return every trained parameter and its moments; on the CPU they are the live ones."""
        return optimizer_fragments(self.trained, self._optimizer)

    def restore(self, read: Read, steps: int) -> None:
        """Go on from fragments, whoever wrote them, with ``steps`` done."""
        restore_optimizer(self.trained, self._optimizer, read, steps)

    def gather(self) -> dict[str, Tensor]:
        """Return what was trained."""
        return {name: p.detach().float().cpu() for name, p in self.trained.items()}


def run_here(
    task: TrainingTask, config: TrainingConfig, run_dir: Path, report: Report
) -> TrainingOutcome:
    """Run a task in this process."""
    engine = TorchEngine(task, config)
    history = training_loop(task, engine, config, run_dir, report)
    return TrainingOutcome(history=history, state=engine.gather())
