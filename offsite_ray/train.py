# SPDX-License-Identifier: Apache-2.0
"""Training on Ray Train with DeepSpeed ZeRO: the same loop, another engine.

Every worker builds the task's module (under ZeRO-3 each weight is cut up as soon as it is read, so
no worker holds the whole model), and the loop runs as in one process. Checkpoints and the result go
to the run's directory, which all workers must see.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.cluster import check_room, embedded_ray
from offsite_ray.errors import OffsiteError, TrainingError
from offsite_ray.results import EvalRecord, RunStart, StepRecord, TrainingHistory, to_plain
from offsite_ray.training import TrainingOutcome, adamw, training_loop

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from offsite_ray.config import TrainingConfig
    from offsite_ray.training import Report, TrainingTask
    from offsite_ray.training.protocols import Batch

_RECORDS = "records.jsonl"
_STATE = "trained.safetensors"
_POLL_SECONDS = 0.5

_RECORD_TYPES = {cls.__name__: cls for cls in (RunStart, StepRecord, EvalRecord)}


def run_on_ray(
    task: TrainingTask, config: TrainingConfig, run_dir: Path, report: Report
) -> TrainingOutcome:
    """Run a task on Ray Train workers, in the cluster at hand or in one of this process.

    Args:
        task: What to train.
        config: ``num_workers``, ``zero_stage`` and ``use_gpu`` say where.
        run_dir: Directory that every worker sees, e.g. on shared storage.
        report: Told of the records of worker 0 as they come.

    Raises:
        ConfigError: The cluster cannot hold the workers.
        TrainingError: They failed.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    run_dir = run_dir.resolve()
    (run_dir / _RECORDS).unlink(missing_ok=True)
    with embedded_ray(config.num_workers), following(run_dir / _RECORDS, report):
        gpu = _use_gpu(config)
        check_room(config.num_workers, gpu=gpu)
        with tempfile.TemporaryDirectory(prefix="offsite-ray-") as storage:
            trainer = TorchTrainer(
                worker,
                train_loop_config={"task": task, "config": config, "run_dir": str(run_dir)},
                torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
                scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=gpu),
                run_config=RunConfig(  # type: ignore[call-arg]  # typed as the one before V2
                    name=run_dir.name.strip("."),
                    storage_path=storage,
                    failure_config=FailureConfig(max_failures=0),
                    worker_runtime_env={"env_vars": _worker_env(config.num_workers, gpu=gpu)},
                ),
            )
            try:
                trainer.fit()
            except Exception as error:
                raise _worker_error(error) from error
    return _outcome(run_dir)


def _outcome(run_dir: Path) -> TrainingOutcome:
    from safetensors.torch import load_file

    plain = json.loads((run_dir / "history.json").read_text(encoding="utf-8"))
    return TrainingOutcome(
        history=TrainingHistory.from_plain(plain), state=load_file(run_dir / _STATE)
    )


def _use_gpu(config: TrainingConfig) -> bool:
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0 if config.use_gpu is None else config.use_gpu


def _worker_env(num_workers: int, *, gpu: bool) -> dict[str, str]:
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // num_workers))
    common = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "TOKENIZERS_PARALLELISM": "false",
        # DeepSpeed compiles with ninja, which lies beside the interpreter.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    return common if gpu else {**common, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": threads}


def _worker_error(error: Exception) -> OffsiteError:
    """Return what failed on a worker as one line, without Ray's frame around it."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    first: BaseException = next(iter(failures.values()))
    while not isinstance(first, OffsiteError) and first.__cause__ is not None:
        first = first.__cause__
    if isinstance(first, OffsiteError):
        return first
    lines = (str(first).strip() or type(first).__name__).splitlines()
    if type(first).__name__ == "ActorDiedError":
        lines = [
            "a worker died, out of memory or killed; --resume goes on from the last checkpoint"
        ]
    return TrainingError(f"training on Ray failed: {lines[-1][:500]}")


@contextlib.contextmanager
def following(records: Path, report: Report) -> Iterator[None]:
    """Report what worker 0 appends to a file, while the block runs and once at its end."""
    ended = threading.Event()
    position = 0

    def read() -> None:
        nonlocal position
        if not records.exists():
            return
        with records.open("rb") as lines:
            lines.seek(position)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                kind, values = json.loads(line)
                report(_RECORD_TYPES[kind](**values))

    def follow() -> None:
        while not ended.wait(_POLL_SECONDS):
            read()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        read()


def worker(given: dict[str, Any]) -> None:
    """Train on one worker of Ray Train; the process group is there already."""
    import torch
    import torch._dynamo  # deepspeed.zero.Init breaks its first import
    import torch.distributed as dist

    task, config = given["task"], given["config"]
    run_dir = Path(given["run_dir"])
    if not config.use_gpu and not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    engine = DeepSpeedEngine(task, config)
    records = (run_dir / _RECORDS).open("a", encoding="utf-8") if engine.rank == 0 else None

    def report(record: RunStart | StepRecord | EvalRecord) -> None:
        if records is not None:
            records.write(json.dumps([type(record).__name__, to_plain(record)]) + "\n")
            records.flush()

    try:
        history = training_loop(task, engine, config, run_dir, report)
        state = engine.gather()
    finally:
        if records is not None:
            records.close()
    if engine.rank == 0:
        from offsite_ray.bundle import specs, write_file

        (run_dir / _STATE).unlink(missing_ok=True)
        write_file(run_dir / _STATE, specs(state))
        text = json.dumps(to_plain(history))
        (run_dir / "history.json").write_text(text, encoding="utf-8")
    dist.barrier()


def deepspeed_config(config: TrainingConfig, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's settings; the loop accumulates and weights gradients itself."""
    micro = config.micro_batch_size or config.batch_size // world_size
    own = config.batch_size // world_size
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": -(-own // micro),
        "gradient_clipping": config.max_grad_norm,
        # Stage 0 has no float32 masters of its own: there the loop's autocast does the same.
        "bf16": {"enabled": config.dtype == "bf16" and config.zero_stage > 0},
        "zero_optimization": {
            "stage": config.zero_stage,
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    """Training on one of several workers, with DeepSpeed ZeRO stage 0 to 3."""

    def __init__(self, task: TrainingTask, config: TrainingConfig) -> None:
        """Build the task's module and DeepSpeed's engine around it."""
        import deepspeed
        import torch
        import torch.distributed as dist

        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        gpu = dist.get_backend() == "nccl"
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        )
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
        settings = deepspeed_config(config, self.world_size)
        with _partitioned_loading(settings):
            module = task.build(self.device)
        self._names = [n for n, p in module.named_parameters() if p.requires_grad]
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=adamw(module, config), config=settings
        )
        self._autocast = config.dtype == "bf16" and not settings["bf16"]["enabled"]
        self._micro_batches = settings["gradient_accumulation_steps"]
        self._done = 0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the parts of the loss, summed over the batch."""
        import torch

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

    def step(self, learning_rate: float) -> float | None:
        """Reduce, clip and apply the gradient; return its norm before clipping, if known."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self._done = 0
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def reduce(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all workers."""
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def save(self, directory: Path) -> None:
        """Write each worker's share of the optimizer state."""
        self._engine.save_checkpoint(str(directory), tag="zero", exclude_frozen_parameters=True)

    def load(self, directory: Path) -> None:
        """Read what :meth:`save` wrote, by the same number of workers."""
        loaded, _ = self._engine.load_checkpoint(
            str(directory), tag="zero", load_module_strict=False
        )
        if loaded is None:
            raise TrainingError(f"{directory} is no checkpoint that DeepSpeed can read")

    def gather(self) -> dict[str, Tensor]:
        """Return what was trained, from the float32 masters; whole on worker 0."""
        from deepspeed.utils import safe_get_full_fp32_param

        parameters = dict(self._engine.module.named_parameters())
        state = {}
        for name in self._names:
            master = safe_get_full_fp32_param(parameters[name])
            whole = parameters[name].detach() if master is None else master
            if self.rank == 0:
                state[name] = whole.detach().float().cpu().clone()
        return state


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


__all__ = ["DeepSpeedEngine", "deepspeed_config", "run_on_ray"]
