# SPDX-License-Identifier: Apache-2.0
"""The teacher on its own: the lower part of the full model, whose outputs fill a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from offsite_ray.architectures import (
    DTYPES,
    get_blocks,
    load_config,
    load_model,
    resolve_architecture,
    set_blocks,
)
from offsite_ray.bundle import atomic_file, specs, write_file
from offsite_ray.data import all_blocks
from offsite_ray.storage import fetched
from offsite_ray.training import loaded_dtype
from offsite_ray.training.batches import collate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from offsite_ray.config import DistillConfig
    from offsite_ray.distillation.cache import CacheTask


class Teacher:
    """The full model up to the last block whose output is wanted."""

    def __init__(self, task: CacheTask, *, gpu: bool) -> None:
        """Load it."""
        self._task = task
        self._device = torch.device("cuda" if gpu else "cpu")
        stored = loaded_dtype(DTYPES[task.key.dtype])
        directory = fetched(task.model)
        model = load_model(directory, dtype=stored, dropout=False)
        arch = resolve_architecture(load_config(directory), task.blocks)
        blocks = list(get_blocks(model, arch))[: max(task.key.ends) + 1]
        set_blocks(model, arch, torch.nn.ModuleList(blocks))
        self._model: Any = model.to(self._device)  # type: ignore[arg-type]
        self._caught: dict[int, Tensor] = {}
        for end in task.key.ends:
            blocks[end].register_forward_hook(self._catch(end))
        self._rows = all_blocks(task.data.at_hand)

    def _catch(self, end: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            self._caught[end] = output[0] if isinstance(output, tuple) else output

        return hook

    def write(self, part: int) -> None:
        """Compute and write the rows of a part; whole as soon as it is there."""
        key = self._task.key
        begin = part * key.rows_per_file
        rows = range(begin, min(begin + key.rows_per_file, key.num_rows))
        found: dict[int, list[Tensor]] = {end: [] for end in key.ends}
        for first in range(0, len(rows), self._task.batch_size):
            self._run(rows[first : first + self._task.batch_size])
            for end, outputs in found.items():
                outputs.append(self._caught[end].to("cpu", DTYPES[key.dtype]))
        tensors = {str(end): torch.cat(outputs) for end, outputs in found.items()}
        with atomic_file(self._task.file(part)) as tmp:
            write_file(tmp, specs(tensors))

    @torch.no_grad()
    def _run(self, rows: Iterable[int]) -> None:
        batch = collate([self._rows[row] for row in rows], self._device)
        given = {"input_ids": batch["input_ids"], "use_cache": False}
        if self._task.use_positions and "position_ids" in batch:
            given["position_ids"] = batch["position_ids"]
        half = self._task.key.dtype == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            self._model.base_model(**given)


def fill_here(
    task: CacheTask, config: DistillConfig, parts: Sequence[int], tell: Callable[[int], None]
) -> None:
    """Write parts of a cache in this process."""
    gpu = torch.cuda.is_available() if config.use_gpu is None else config.use_gpu
    teacher = Teacher(task, gpu=gpu)
    for part in parts:
        teacher.write(part)
        tell(part)
