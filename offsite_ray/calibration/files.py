# SPDX-License-Identifier: Apache-2.0
"""Files with what was found of each block: kept in a folder, or as long as somebody needs them."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping


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
    if folder is None:
        folder = Path(tempfile.mkdtemp())
        weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    files = {index: folder / f"block-{index:05}.safetensors" for index in blocks}
    missing = {index: file for index, file in files.items() if not file.is_file()}
    if missing:
        write(missing)
    return list(files.values())
