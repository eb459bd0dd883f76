# SPDX-License-Identifier: Apache-2.0
"""What was found of a model on a text, in files: kept in the user's cache, by model and text.

Of processes that want the same at the same time one computes it; the others wait, and read it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from offsite_ray.bundle import alone, atomic_file, specs, user_cache, write_file
from offsite_ray.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from torch import Tensor


class Kept:
    """The files of one model and text; none, where there is no cache that takes them."""

    def __init__(self, key: str) -> None:
        """Take what the names of the files begin with: a digest of model and text."""
        self._key = key

    def folder(self, what: str) -> Path | None:
        """Return a folder for something, which need not be there; None: it cannot be kept."""
        folder = user_cache("calibration")
        return folder / f"{self._key}{what}" if folder is not None and _takes(folder) else None

    def tensors(self, what: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return tensors as they were kept, or computed and kept from then on."""
        folder = user_cache("calibration")
        file = None if folder is None else folder / f"{self._key}{what}.safetensors"
        if file is None:
            return compute()
        if not file.is_file():
            with _alone(file):
                if not file.is_file():
                    found = compute()
                    # Where it cannot be kept, it is computed again.
                    with contextlib.suppress(StorageError), atomic_file(file) as tmp:
                        write_file(tmp, specs(found))
                    return found
        return load_file(file)

    def number(self, what: str, name: str, compute: Callable[[], float]) -> float:
        """Return one of several numbers as it was kept, or computed and kept from then on."""
        folder = user_cache("calibration")
        file = None if folder is None else folder / f"{self._key}{what}.json"
        if file is None:
            return compute()
        if (known := _numbers(file).get(name)) is not None:
            return known
        with _alone(file):
            numbers = _numbers(file)
            if name not in numbers:
                numbers[name] = compute()
                with contextlib.suppress(StorageError), atomic_file(file) as tmp:
                    tmp.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
            return numbers[name]


def _numbers(file: Path) -> dict[str, float]:
    """Return the numbers of a file by name; of one that is missing or damaged, none."""
    try:
        return {str(name): float(n) for name, n in json.loads(file.read_text("utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep others from computing what goes to a path, as far as it can be kept there."""
    with contextlib.ExitStack() as stack:
        if _takes(path.parent):
            with contextlib.suppress(OSError, StorageError):
                stack.enter_context(alone(path.with_name(f".{path.name}.lock")))
        yield


def _takes(folder: Path) -> bool:
    """Return whether files can be kept in a folder, which is made if need be."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


def block_files(
    owner: object,
    blocks: Collection[int],
    folder: Path | None,
    write: Callable[[Mapping[int, Path]], None],
) -> list[Path]:
    """Return a file for each block; those that are not there are written.

    Args:
        owner: Whoever reads the files.
        blocks: Absolute indices.
        folder: Where they are kept and looked for; None: as long as the owner is.
        write: Given the blocks without a file, and where it goes.
    """
    others: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if folder is None:
        folder = Path(tempfile.mkdtemp())
        weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    else:
        others = _alone(folder)
    files = {index: folder / f"block-{index:05}.safetensors" for index in blocks}
    if not all(file.is_file() for file in files.values()):
        with others:
            missing = {index: file for index, file in files.items() if not file.is_file()}
            if missing:
                write(missing)
    return list(files.values())
