# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: the adapter blocks of a bundle, or a full model as the baseline."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from offsite_ray.adapter import write_adapter
from offsite_ray.architectures import (
    DTYPES,
    Notice,
    disk_state,
    load_config,
    load_model,
    resolve_architecture,
)
from offsite_ray.bundle import TensorDirectory, rewrite_model
from offsite_ray.data import PreparedData, TokenBlocks, split_blocks
from offsite_ray.emulator import (
    open_bundle,
    open_full_model,
    refuse_bottlenecks,
    rounded,
    write_companions,
)
from offsite_ray.finetuning.host import Host, host_of_bundle, host_of_full_model
from offsite_ray.finetuning.methods import finetuning_method
from offsite_ray.finetuning.module import finetuning_module
from offsite_ray.finetuning.writing import write_plugged_in
from offsite_ray.results import TrainingHistory, recipe_of
from offsite_ray.storage import fetched, found_by_all, published
from offsite_ray.training import (
    LANGUAGE_MODEL,
    Fit,
    Report,
    TrainingOutcome,
    check_out,
    keeps_documents_apart,
    loaded_dtype,
    run_directory,
    set_dtypes,
)
from offsite_ray.training.sources import prepared_for
from offsite_ray.uris import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from offsite_ray.config import FinetuneConfig
    from offsite_ray.emulator import EmulatorBundle


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneTask:
    """A language model of which some part trains. Plain values: it is shipped to workers."""

    model: str
    """By which every node finds the model."""
    model_id: str
    """Id of the bundle, or the name of the baseline's full model."""
    blocks: str | None
    """Path of the block list, where the table has no row."""
    indices: tuple[int, ...] | None
    """Blocks to train, as the model numbers them; None: everything, embeddings too."""
    config: FinetuneConfig
    data: PreparedData
    use_positions: bool
    loss_weights: Mapping[str, float] = field(default_factory=lambda: {"lm": 1.0})
    loss_units: Mapping[str, Literal["token", "sequence"]] = field(
        default_factory=lambda: {"lm": "token"}
    )

    @property
    def flops_per_token(self) -> float | None:
        """Operations of a training step for each token, without recomputation; not counted."""
        return None

    def build(self, device: torch.device) -> nn.Module:
        """Return the model with its loss, on ``device``."""
        compute = DTYPES[self.config.dtype]
        stored = loaded_dtype(compute)
        directory = fetched(self.model)
        model = load_model(directory, dtype=stored, dropout=False)
        arch = resolve_architecture(load_config(directory), self.blocks)
        module = finetuning_module(
            model, arch, self.indices, self.config, use_positions=self.use_positions
        )
        set_dtypes(module, compute)
        if device.type == "cpu" and stored is None and self.config.method == "full":
            _map_frozen_anew(model, directory)
        return module.to(device)

    def datasets(self) -> tuple[TokenBlocks, TokenBlocks]:
        """Return the rows to train on and the held-out ones."""
        return split_blocks(self.data.at_hand, self.config.eval_fraction, self.config.seed)

    def fingerprint(self) -> dict[str, Any]:
        """Return what a checkpoint must agree on to be resumed."""
        return {
            "model": self.model_id,
            "indices": self.indices,
            "data": self.data.digest,
        }


def _map_frozen_anew(model: PreTrainedModel, directory: Path) -> None:
    """Let go of the pages of the weights' file that were read for what is float32 now.

    They stay in memory as long as the file is mapped, and the frozen weights are that mapping. In
    a second one nothing else is ever read.
    """
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    # ZeRO-3 keeps no mapping.
    if not frozen or any(hasattr(parameter, "ds_id") for parameter in frozen.values()):
        return
    for name, stored in load_model(directory, dropout=False).named_parameters():
        if name in frozen and frozen[name].dtype == stored.dtype:
            frozen[name].data = stored.data


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneResult:
    """What ``finetune`` made."""

    out: str
    id: str | None
    """Id of the adapter bundle; None for the baseline, which is an ordinary model directory."""
    method: str
    num_trained: int
    """Parameters that were trained."""
    first_loss: float | None
    """Held-out loss before the first step, nats per token."""
    last_loss: float | None
    """Held-out loss of the weights that were written."""
    history: TrainingHistory
    seconds: float


def finetune(
    config: FinetuneConfig, fit: Fit, report: Report, notice: Notice | None = None
) -> FinetuneResult:
    """Train the adapter blocks of a bundle (or the full model, as the baseline).

    Args:
        config: What to train, on what, how.
        fit: Runs the training: in this process or on Ray.
        report: Told of each step and evaluation.
        notice: Told what is unusual but not wrong.

    Raises:
        OffsiteError: Bundle, data or method cannot be used; nothing is left behind.
    """
    start = time.perf_counter()
    check_out(config.out, config.resume)
    finetuning_method(config.method)
    bundle = open_bundle(config.bundle) if config.bundle is not None else None
    host = host_of_bundle(bundle) if bundle else _baseline_host(config, notice)
    with run_directory(config.out, config.resume) as run_dir:
        task = _task(config, host, bundle, run_dir, notice)
        outcome = fit(task, config, run_dir, report)
        state = {n.removeprefix(LANGUAGE_MODEL): t for n, t in outcome.state.items()}
        # Not the digest of the data: by it the owner of the model could confirm a guess of them.
        recipe = recipe_of(config, changes=outcome.history.changes)
        measured = {
            "seconds": outcome.history.seconds,
            "peak_memory_bytes": outcome.history.peak_memory_bytes,
            "num_trained": sum(tensor.numel() for tensor in state.values()),
        }
        if bundle is None:
            _write_baseline(config.out, run_dir, state, host, config, whole=task.indices is None)
            bundle_id = None
        else:
            method = finetuning_method(config.method)
            bundle_id = write_adapter(
                bundle,
                config.out,
                lambda tmp: method.save(tmp, state, host, config),
                recipe,
                measured,
            ).id
    return _result(config, bundle_id, outcome, time.perf_counter() - start)


def _baseline_host(config: FinetuneConfig, notice: Notice | None) -> Host:
    """Return the full model as what trains; one whose result could not be written is refused."""
    full = open_full_model(config.model or "", config.blocks, notice)
    refuse_bottlenecks(full.path)
    return host_of_full_model(full)


def _task(
    config: FinetuneConfig,
    host: Host,
    bundle: EmulatorBundle | None,
    run_dir: Path,
    notice: Notice | None,
) -> FinetuneTask:
    apart = keeps_documents_apart(host.config, host.arch, host.weights)
    if not apart and notice is not None:
        notice(
            f"the attention of {host.config.model_type} cannot keep the documents in a block "
            "apart: each also sees those before it"
        )
    given = config.bundle or config.model or ""
    whole = bundle is None and config.method == "full"
    return FinetuneTask(
        model=found_by_all(given, host.path),
        model_id=bundle.manifest.id if bundle else shown(given),
        blocks=host.arch.blocks_path,
        indices=None if whole else tuple(host.positions.values()),
        config=config,
        data=prepared_for(config.data, host.path, host.config, config.seq_len, run_dir, notice),
        use_positions=apart,
    )


def _write_baseline(
    out: str,
    run_dir: Path,
    state: Mapping[str, Tensor],
    host: Host,
    config: FinetuneConfig,
    *,
    whole: bool,
) -> None:
    """Write the fine-tuned full model: all of it, or with the method's tensors merged."""
    with published(out) as tmp:
        if whole:
            disk = disk_state(host.config, host.arch, state, host.weights.tensors)
            stored = {n: rounded(n, t, host.weights.tensors[n].dtype) for n, t in disk.items()}
            rewrite_model(host.path, tmp, stored)
            write_companions(host.path, tmp, None)
            return
        method = finetuning_method(config.method)
        with tempfile.TemporaryDirectory(dir=run_dir) as saved:
            files = method.save(Path(saved), state, host, config)
            tensors = [Path(saved) / name for name in files if name.endswith(".safetensors")]
            write_plugged_in(tmp, host, method, Path(saved), TensorDirectory(tensors))


def _result(
    config: FinetuneConfig, bundle_id: str | None, outcome: TrainingOutcome, seconds: float
) -> FinetuneResult:
    evaluations, last = outcome.history.evaluations, outcome.history.result_evaluation
    return FinetuneResult(
        out=shown(config.out),
        id=bundle_id,
        method=config.method,
        num_trained=sum(tensor.numel() for tensor in outcome.state.values()),
        first_loss=evaluations[0].losses["lm"] if evaluations else None,
        last_loss=last.losses["lm"] if last else None,
        history=outcome.history,
        seconds=seconds,
    )
