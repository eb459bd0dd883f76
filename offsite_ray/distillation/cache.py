# SPDX-License-Identifier: Apache-2.0
"""The teacher's outputs on disk: written once for a corpus, read by any number of distillations.

The teacher is frozen, so what comes out of a block of the full model for a block of tokens never
changes. A cache holds it behind some blocks, for all the prepared data, in safetensors of a few
rows each. With it an emulator is distilled without the full model in memory: its own bundle has
everything else. The files are written first and the manifest last: a directory without one is a
cache that is not whole yet, and writing goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from offsite_ray.architectures import DTYPES
from offsite_ray.bundle import (
    DTYPE_NAMES,
    TensorDirectory,
    check_parent,
    fingerprint,
    storage_errors,
    write_json,
)
from offsite_ray.bundle.digest import digest_plain
from offsite_ray.distillation.losses import active_losses
from offsite_ray.distillation.module import TEACHER
from offsite_ray.errors import CacheError, OffsiteError
from offsite_ray.results import to_plain
from offsite_ray.storage import found_by_all

if TYPE_CHECKING:
    from torch import Tensor

    from offsite_ray.config import DistillConfig
    from offsite_ray.data import PreparedData, TokenBlocks
    from offsite_ray.emulator import FullModel
    from offsite_ray.split import SplitPlan

CACHE_MANIFEST = "offsite-cache.json"
_SCHEMA_VERSION = 1
_FILE_BYTES = 256 * 2**20
"""Bytes of a file, about: what one actor computes at a time, and what a kill costs at most."""
_LEFT_AFTER_S = 3600
"""Age of a temporary file that nobody writes to any longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheKey:
    """What a cache was made of; one with another key is refused."""

    model: str
    """Digest of the full model: config, tensors, and a sample of every tensor's bytes."""
    data: str | None
    """Digest of the prepared data."""
    ends: tuple[int, ...]
    """Blocks of the full model whose outputs it holds."""
    dtype: str
    """Of the arithmetic, and of what is stored: ``fp32`` or ``bf16``."""
    num_rows: int
    rows_per_file: int
    shape: tuple[int, int]
    """Tokens of a row, and width of a hidden state."""


def part_name(part: int) -> str:
    """Return the file of a part."""
    return f"teacher-{part:06}.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheTask:
    """How a cache is written. Plain values: it is shipped to actors."""

    key: CacheKey
    model: str
    blocks: str | None
    data: PreparedData
    directory: str
    batch_size: int
    use_positions: bool

    def parts(self) -> list[int]:
        """Return the numbers of the files that are not there yet."""
        count = -(-self.key.num_rows // self.key.rows_per_file)
        return [part for part in range(count) if not self.file(part).is_file()]

    def file(self, part: int) -> Path:
        """Return where a part is written."""
        return Path(self.directory) / part_name(part)


Fill = Callable[[CacheTask, "DistillConfig", Sequence[int], Callable[[int], None]], None]
"""Writes parts of a cache, and tells of each: :func:`fill_here`, or on Ray."""


def needed_ends(plan: SplitPlan, config: DistillConfig) -> tuple[int, ...]:
    """Return the blocks whose outputs the losses need, ascending."""
    losses = active_losses(config).values()
    found = {end for loss in losses if loss.ends is not None for end in loss.ends(plan)}
    if any(loss.teacher_logits for loss in losses):
        found.add(plan.middle[-1])
    return tuple(sorted(found))


def cache_task(
    full: FullModel,
    plan: SplitPlan,
    config: DistillConfig,
    data: PreparedData,
    blocks: str | None,
    *,
    use_positions: bool,
) -> CacheTask:
    """Return how the cache for a distillation is written."""
    width = full.config.get_text_config().hidden_size
    ends = needed_ends(plan, config)
    row_bytes = len(ends) * data.block_size * width * DTYPES[config.dtype].itemsize
    key = CacheKey(
        model=digest_plain(to_plain(fingerprint(full.path, full.weights, {}))),
        data=data.digest,
        ends=ends,
        dtype=config.dtype,
        num_rows=data.num_blocks,
        rows_per_file=max(1, _FILE_BYTES // row_bytes),
        shape=(data.block_size, width),
    )
    return CacheTask(
        key=key,
        model=found_by_all(config.model, full.path),
        blocks=blocks,
        data=data,
        directory=str(Path(config.teacher_cache or "").resolve()),
        batch_size=config.micro_batch_size or config.batch_size // max(1, config.num_workers),
        use_positions=use_positions,
    )


def ensure_cache(
    task: CacheTask, config: DistillConfig, fill: Fill, notice: Callable[[str], None]
) -> None:
    """Write a cache, or what is missing of it; one that is whole and fits is left as it is.

    Raises:
        CacheError: There is a cache of another model, other data or other blocks.
        StorageError: It cannot be written.
    """
    directory = Path(task.directory)
    manifest = directory / CACHE_MANIFEST
    if manifest.is_file():
        open_cache(directory, task.key)
        return
    check_parent(directory)
    begun = directory / "begun.json"
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if (found := _begun(begun)) is not None:
            _check_key(directory, found, task.key, exact=True)
        elif manifest.is_file():  # another run has ended meanwhile
            open_cache(directory, task.key)
            return
        elif not all(_is_unfinished(path) for path in directory.iterdir()):
            raise CacheError(f"{directory} is not empty and no cache; choose another directory")
        _remove_left(directory)
        write_json(begun, to_plain(task.key))
        parts = task.parts()
        total = -(-task.key.num_rows // task.key.rows_per_file)
        done = total - len(parts)
        notice(f"teacher cache: {done} of {total} files are there; writing the rest to {directory}")

        def tell(_part: int) -> None:
            nonlocal done
            done += 1
            notice(f"teacher cache: {done}/{total} files")

        if parts:
            fill(task, config, parts, tell)
        write_json(manifest, {"schema_version": _SCHEMA_VERSION, "key": to_plain(task.key)})
        begun.unlink(missing_ok=True)  # another run that wrote the same may have ended before


def _begun(path: Path) -> Any:
    """Return the key of a cache that is being written; None where none is."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _is_unfinished(path: Path) -> bool:
    """Return whether a file has the temporary name that it is written under."""
    return path.name.startswith(".") and ".tmp-" in path.name


def _remove_left(directory: Path) -> None:
    """Remove what killed processes were writing; what is younger may be another run's."""
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another run's, which has its name now
            if _is_unfinished(path) and path.stat().st_mtime < time.time() - _LEFT_AFTER_S:
                path.unlink()


def _check_key(directory: Path, found: Any, wanted: CacheKey, *, exact: bool) -> None:
    """Refuse a cache that was made of something else; raise :class:`CacheError`."""
    known = {**to_plain(wanted), **(found if isinstance(found, dict) else {})}
    expected = to_plain(wanted)
    for name, words in _WORDS.items():
        same = known[name] == expected[name]
        if name == "ends" and not exact:
            same = set(expected[name]) <= set(known[name])
        if not same:
            raise CacheError(
                f"{directory} is a teacher cache of {words} ({known[name]}, and {expected[name]} "
                "is needed); choose another --teacher-cache, or remove it"
            )


_WORDS = {
    "model": "another full model",
    "data": "other prepared data",
    "ends": "other blocks",
    "dtype": "another arithmetic",
    "num_rows": "another number of rows",
    "shape": "rows of another shape",
}
"""Part of a key to what differs where it does."""


class TeacherCache:
    """An opened cache: the teacher's outputs by row."""

    def __init__(self, directory: Path, key: CacheKey) -> None:
        """Take a checked directory; nothing is opened yet."""
        self._directory, self._key = directory, key
        self._files: dict[int, Any] = {}

    def __reduce__(self) -> tuple[type[TeacherCache], tuple[Path, CacheKey]]:
        """Leave what is open to the process that it belongs to."""
        return TeacherCache, (self._directory, self._key)

    def row(self, number: int, ends: Sequence[int]) -> dict[str, Tensor]:
        """Return the teacher's outputs for a row, ``(T, H)`` each, as a batch names them."""
        part, inside = divmod(number, self._key.rows_per_file)
        if part not in self._files:
            self._files[part] = safe_open(self._directory / part_name(part), "pt")
        file = self._files[part]
        return {f"{TEACHER}{end}": file.get_slice(str(end))[inside] for end in ends}


class CachedBlocks:
    """Prepared blocks with the teacher's outputs beside them."""

    def __init__(self, blocks: TokenBlocks, cache: TeacherCache, ends: Sequence[int]) -> None:
        """Take the blocks, and whose outputs to add."""
        self._blocks, self._cache, self._ends = blocks, cache, tuple(ends)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a block and ``teacher_17``: ``(T, H)``, for each of the ends."""
        return {
            **self._blocks[index],
            **self._cache.row(self._blocks.number(index), self._ends),
        }


def open_cache(directory: Path, wanted: CacheKey) -> TeacherCache:
    """Return a cache that fits; headers are checked, not every byte.

    Raises:
        CacheError: It is of another model, other data or other blocks, or damaged.
    """
    path = directory / CACHE_MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        key = values["key"]
        if values["schema_version"] != _SCHEMA_VERSION:
            raise ValueError(f"schema version {values['schema_version']}")
        _check_key(directory, key, wanted, exact=False)
        found = CacheKey(**{**key, "ends": tuple(key["ends"]), "shape": tuple(key["shape"])})
        _check_files(directory, found)
    except CacheError:
        raise
    except (OSError, ValueError, KeyError, TypeError, OffsiteError) as error:
        raise CacheError(
            f"{directory} is a damaged teacher cache: {error}; remove it, and it is written anew"
        ) from error
    return TeacherCache(directory, found)


def _check_files(directory: Path, key: CacheKey) -> None:
    for part in range(-(-key.num_rows // key.rows_per_file)):
        rows = min(key.rows_per_file, key.num_rows - part * key.rows_per_file)
        file = TensorDirectory([directory / part_name(part)])
        for end in key.ends:
            info = file.tensors.get(str(end))
            layout = (DTYPE_NAMES[DTYPES[key.dtype]], (rows, *key.shape))
            if info is None or info.layout != layout:
                raise CacheError(f"{directory}: file {part} does not hold {layout} of block {end}")
