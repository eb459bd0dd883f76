# SPDX-License-Identifier: Apache-2.0
"""Reading the rows of the next step while this one is computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from offsite_ray.training.protocols import TokenDataset


class Prefetched:
    """Rows that one thread reads, some of them before they are asked for."""

    def __init__(self, rows: TokenDataset) -> None:
        """Take the rows; they are only read in that thread from now on."""
        self._rows = rows
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        self._coming: dict[int, Future[Mapping[str, Tensor]]] = {}

    def ahead(self, rows: Iterable[int]) -> None:
        """Begin to read some rows, each of which is then asked for once."""
        for row in rows:
            if row not in self._coming:
                self._coming[row] = self._submit(row)

    def _submit(self, row: int) -> Future[Mapping[str, Tensor]]:
        return self._reader.submit(self._rows.__getitem__, row)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def __getitem__(self, row: int) -> Mapping[str, Tensor]:
        """Return a row."""
        coming = self._coming.pop(row, None)
        return (coming or self._submit(row)).result()

    def __enter__(self) -> Prefetched:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Read no more."""
        self._reader.shutdown(cancel_futures=True)
