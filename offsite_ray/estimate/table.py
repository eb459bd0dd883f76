# SPDX-License-Identifier: Apache-2.0
"""An estimate for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offsite_ray.estimate.run import micro_batch, peak_tflops
from offsite_ray.results import bytes_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Group, RenderableType

    from offsite_ray.config import EstimateConfig
    from offsite_ray.estimate.memory import Memory
    from offsite_ray.estimate.run import Cost, Estimate, Option

_MEMORY = (
    "", "weights", "masters", "gradients", "moments", "activations", "buffers", "total", "host",
    "fits",
)  # fmt: skip
_SECONDS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))


def estimate_tables(estimate: Estimate, config: EstimateConfig) -> Group:
    """Return an estimate as tables for ``rich``."""
    from rich.console import Group

    device = "GPU" if config.use_gpu else "process"
    parts = [
        *_titled(_title(estimate), ("artefact", "bytes"), _artefacts(estimate)),
        *_titled(f"Memory of one {device} at its peak, GiB", _MEMORY, _costs(estimate, config)),
    ]
    if estimate.options:
        counts = list(estimate.options[0].total_bytes)
        parts += _titled(
            f"Distillation by the number of {device}s, {micro_batch(config)} sequences at a time "
            "on each: GiB of each, and of the host for each",
            ("ZeRO", "offload", *map(str, counts), "fits from"),
            (_option(option, counts) for option in estimate.options),
        )
    peak = peak_tflops(config)
    parts += _titled(
        f"Time at {config.utilisation:.0%} of the peak, "
        f"{'which is not known' if peak is None else f'{peak:g} TFLOP/s' + _whose(config)}",
        ("", "FLOPs/step", "FLOPs/token", "recomputed", "tokens/s", f"{config.tokens:.3g} tokens"),
        (_time(name, cost) for name, cost in _named(estimate, config)),
    )
    return Group(*parts)


def _whose(config: EstimateConfig) -> str:
    return "" if config.peak_tflops else ", an A100's"


def _title(estimate: Estimate) -> str:
    model = estimate.model
    return (
        f"{model.family}, {model.num_parameters / 1e9:.2f} B parameters in {model.stored_dtype}, "
        f"{model.num_blocks} blocks; plan {model.plan}: emulator model of {model.num_kept} blocks, "
        f"{model.num_emulator_parameters / 1e9:.2f} B"
    )


def _artefacts(estimate: Estimate) -> Iterator[tuple[str, str]]:
    sizes = estimate.artefact_bytes
    yield "full model", bytes_text(sizes.full_model)
    yield "emulator bundle", bytes_text(sizes.emulator_bundle)
    for method, size in sizes.adapter_bundle.items():
        yield f"adapter bundle, {method}", "nothing to train" if size is None else bytes_text(size)
    yield "checkpoint of distillation", bytes_text(sizes.distillation_checkpoint)
    yield "teacher cache, each token", bytes_text(sizes.teacher_cache_per_token)


def _named(estimate: Estimate, config: EstimateConfig) -> Iterator[tuple[str, Cost]]:
    if estimate.distillation is not None:
        yield f"distill, ZeRO-{config.zero_stage}, {config.gpus} of them", estimate.distillation
    for method, cost in estimate.finetuning.items():
        if cost is not None:
            yield f"finetune, {method}", cost
    yield "finetune, full model", estimate.full_finetuning


def _costs(estimate: Estimate, config: EstimateConfig) -> Iterator[tuple[str, ...]]:
    for name, cost in _named(estimate, config):
        yield (name, *_memory(cost.memory), "yes" if cost.fits else "no")


def _memory(memory: Memory) -> Iterator[str]:
    parts = (
        memory.weights,
        memory.masters,
        memory.gradients,
        memory.moments,
        memory.activations,
        memory.buffers,
        memory.total,
        memory.host,
    )
    return (_gib(part) for part in parts)


def _option(option: Option, counts: Sequence[int]) -> tuple[str, ...]:
    cells = (
        _gib(option.total_bytes[count])
        + (f" ({_gib(option.host_bytes[count])})" if option.host_bytes[count] else "")
        for count in counts
    )
    smallest = option.smallest_gpu_count
    return str(option.zero_stage), option.offload, *cells, str(smallest or "never")


def _time(name: str, cost: Cost) -> tuple[str, ...]:
    speed = "not known" if cost.tokens_per_s is None else f"{cost.tokens_per_s:,.0f}"
    return (
        name,
        f"{cost.flops_per_step:.3g}",
        f"{cost.flops_per_token:.3g}",
        f"{cost.operations.recomputed / cost.operations.total:.0%}",
        speed,
        _duration(cost.seconds),
    )


def _titled(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[RenderableType]:
    """Return a line of text and the table below it."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for index, name in enumerate(head):
        table.add_column(Text(name), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return [Text(title), table]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}" if size < 10 * 2**30 else f"{size / 2**30:.1f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    for length, unit in _SECONDS:
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
