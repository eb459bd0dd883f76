# SPDX-License-Identifier: Apache-2.0
"""The peak memory of training with one setting, in processes of their own.

    python -m benchmarks.peaks '{"directory": ...}'     a Setting as JSON; prints bytes as JSON

Everything that runs is the library's own: the task of ``distill`` or ``finetune``, the engine of
this process or of a Ray Train worker, and steps of the loop. Only the rows are made up.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.memory import memory
from offsite_ray.architectures import load_config, model_class
from offsite_ray.config import DistillConfig, FinetuneConfig
from offsite_ray.data import PreparedData
from offsite_ray.distillation import DistillTask
from offsite_ray.emulator import open_bundle, open_full_model
from offsite_ray.finetuning.host import host_of_bundle, host_of_full_model
from offsite_ray.finetuning.run import FinetuneTask
from offsite_ray.training.engine import TorchEngine
from offsite_ray.training.loop import train_step
from offsite_ray.training.schedule import schedule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent

_STEPS = 3
"""The first makes the optimizer's state; what a later one adds is the allocator's."""
_PACKED = "packed"
_FIRST_TOKEN = 4
"""Those before have a meaning of their own, e.g. padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What to train, and how."""

    directory: str
    """With ``model`` and ``bundle`` in it."""
    verb: str
    """``distill``, ``finetune`` (a bundle) or ``finetune-full`` (the whole model)."""
    seq_len: int
    batch_size: int
    """Of all workers together."""
    packed: bool
    """Two documents in every row."""
    device: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the verb's configuration."""


class _Rows:
    """Rows of random tokens."""

    def __init__(self, count: int, seq_len: int, vocab_size: int, *, packed: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (count, seq_len)
        self._tokens = torch.randint(_FIRST_TOKEN, vocab_size, shape, generator=generator)
        self._positions = torch.arange(seq_len) % (seq_len // 2 if packed else seq_len)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self._tokens[index]
        return {"input_ids": tokens, "labels": tokens, "position_ids": self._positions}


class _RandomRows:
    """Rows of random tokens in place of prepared data."""

    def datasets(self: Any) -> tuple[_Rows, _Rows]:
        """Return rows of one document each, or of two."""
        vocab_size = load_config(self.model).vocab_size
        packed = self.data.digest == _PACKED
        rows = _Rows(self.config.batch_size, self.data.block_size, vocab_size, packed=packed)
        return rows, rows


class _Distill(_RandomRows, DistillTask):
    """Distillation on random rows."""


class _Finetune(_RandomRows, FinetuneTask):  # type: ignore[misc]  # other rows
    """Fine-tuning on random rows."""


def task_of(setting: Setting) -> Any:
    """Return the task that the verb would make, with random rows."""
    bundle_dir, model_dir = f"{setting.directory}/bundle", f"{setting.directory}/model"
    common: dict[str, Any] = {
        "batch_size": setting.batch_size,
        "max_steps": _STEPS,
        "data": ("random tokens",),
        "out": "nothing is written",
        "use_gpu": setting.device == "cuda",
        **setting.options,
    }
    data = PreparedData(
        path=Path(setting.directory),
        block_size=setting.seq_len,
        num_blocks=setting.batch_size,
        tokenizer="none",
        digest=_PACKED if setting.packed else None,
    )
    if setting.verb == "distill":
        bundle = open_bundle(bundle_dir)
        return _Distill(
            model=model_dir,
            bundle=bundle_dir,
            bundle_id="benchmark",
            plan=bundle.plan,
            blocks=None,
            config=DistillConfig(model=model_dir, bundle=bundle_dir, **common),
            data=data,
            use_positions=setting.packed,
        )
    of_bundle = setting.verb == "finetune"
    host = (
        host_of_bundle(open_bundle(bundle_dir))
        if of_bundle
        else host_of_full_model(open_full_model(model_dir))
    )
    given: dict[str, Any] = {"bundle": bundle_dir} if of_bundle else {"model": model_dir}
    config = FinetuneConfig(**given, **common)
    whole = not of_bundle and config.method == "full"
    return _Finetune(
        model=str(host.path),
        model_id="benchmark",
        blocks=None,
        indices=None if whole else tuple(host.positions.values()),
        config=config,
        data=data,
        use_positions=setting.packed,
    )


def peak_bytes(setting: Setting) -> int:
    """Return the most that a worker had in use, less what it had before there was a model."""
    workers = _num_workers(setting) or 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(workers),
        "LOCAL_SIZE": str(workers),
        **({} if setting.device == "cuda" else {"DS_ACCELERATOR": "cpu"}),
    }
    command = [sys.executable, "-m", "benchmarks.peaks", json.dumps(asdict(setting))]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in range(workers)
    ]
    outputs = [process.communicate()[0].decode() for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"a process of {setting} failed")
    return max(int(json.loads(output.splitlines()[-1])) for output in outputs)


def _num_workers(setting: Setting) -> int:
    """Return how many workers train; 0: this process, without DeepSpeed."""
    return int(setting.options.get("num_workers", 0))


def _measure(setting: Setting) -> int:
    device = torch.device(setting.device)
    _import_everything(setting)
    before = memory(device, peak=False)
    task = task_of(setting)
    engine = _engine(setting, task)
    train, _ = task.datasets()
    plan = schedule(task.config, len(train))
    for step in range(plan.total_steps):
        train_step(task, engine, task.config, plan, train, step)
    return memory(device, peak=True) - before


def _import_everything(setting: Setting) -> None:
    """Import what would be imported late, so that it counts as program and not as model."""
    import peft  # noqa: F401

    model_class(load_config(f"{setting.directory}/model"))
    if _num_workers(setting):
        import deepspeed

        from offsite_ray.train.extension import build_extension

        if setting.device == "cpu":
            build_extension()
        deepspeed.init_distributed("nccl" if setting.device == "cuda" else "gloo", verbose=False)


def _engine(setting: Setting, task: Any) -> Any:
    if not _num_workers(setting):
        return TorchEngine(task, task.config)
    from offsite_ray.train.engine import DeepSpeedEngine

    return DeepSpeedEngine(task, task.config)


if __name__ == "__main__":
    print(json.dumps(_measure(Setting(**json.loads(sys.argv[1])))))
