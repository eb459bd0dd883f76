# SPDX-License-Identifier: Apache-2.0
"""Parts of a text to Parquet files of blocks, each part on its own, anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import blake3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from offsite_ray.data.documents import read_piece
from offsite_ray.data.encoding import Encoder, Example
from offsite_ray.data.packing import COLUMNS, IGNORED, Packer
from offsite_ray.errors import StorageError
from offsite_ray.storage import reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from offsite_ray.data.documents import Document
    from offsite_ray.data.packing import Blocks
    from offsite_ray.data.parts import Part
    from offsite_ray.storage import Place

_SCHEMA = pa.schema([(name, pa.list_(pa.int32())) for name in COLUMNS])

_BATCH_CHARACTERS = 2**19
"""That go to the tokenizer at once; its result takes some fifty times as many bytes."""
_BATCH_DOCUMENTS = 1000
_WINDOW_CHARACTERS = 2**24
"""Within which documents change places, where a seed asks for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """A file of blocks."""

    name: str
    """In the prepared directory."""
    num_blocks: int
    num_targets: int
    """Tokens in it that are to be predicted."""
    max_token: int
    num_bytes: int
    digest: str
    """BLAKE3 of its bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenPart:
    """What was made of a part; plain enough for JSON."""

    index: int
    file: WrittenFile | None
    """None: the part does not fill a block."""
    num_documents: int
    num_tokens: int
    num_truncated: int
    divisible: bool
    """Whether all its documents are."""
    rest: tuple[tuple[list[int], list[bool], bool], ...]
    """Tokens, targets and divisibility of what was too little for another block."""

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> WrittenPart:
        """Return what ``to_plain`` made plain."""
        file = None if plain["file"] is None else WrittenFile(**plain["file"])
        return cls(**{**plain, "file": file, "rest": tuple(map(tuple, plain["rest"]))})


class PartWriter:
    """Reads, tokenises, packs and writes parts; may be sent to workers."""

    def __init__(
        self,
        *,
        parts: Sequence[Part],
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        seed: int | None,
        folder: Place,
    ) -> None:
        """Take the parts in their final order, and the directory to write to."""
        self.parts = parts
        self.block_size = block_size
        self._seed = seed
        self._encoder = Encoder(tokenizer)
        self._folder = folder

    def __call__(self, index: int) -> WrittenPart:
        """Write one part.

        Raises:
            DataError: It cannot be read.
            StorageError: Its file cannot be written.
        """
        packer = self._packer()
        documents = self._documents(index)
        file = self._write(index, packer.blocks(_encoded(documents, self._encoder)))
        return WrittenPart(
            index=index,
            file=file,
            num_documents=packer.num_documents,
            num_tokens=packer.num_tokens,
            num_truncated=packer.num_truncated,
            divisible=packer.divisible,
            rest=tuple((e.tokens.tolist(), e.targets.tolist(), e.divisible) for e in packer.rest()),
        )

    def finish(self, written: Iterable[WrittenPart]) -> WrittenFile | None:
        """Write what the parts left over as one more file, the last block padded.

        Args:
            written: The result of every part, in their order.
        """
        packer = self._packer()
        rest = (
            Example(np.asarray(tokens, np.int32), np.asarray(targets, bool), divisible)
            for part in written
            for tokens, targets, divisible in part.rest
        )

        def blocks() -> Iterator[Blocks]:
            yield from packer.blocks(rest)
            yield from packer.last()

        return self._write(len(self.parts), blocks())

    def _packer(self) -> Packer:
        return Packer(block_size=self.block_size, pad=self._encoder.pad)

    def _documents(self, index: int) -> Iterator[Document]:
        documents = (document for piece in self.parts[index] for document in read_piece(piece))
        if self._seed is None:
            yield from documents
            return
        draw = np.random.default_rng([self._seed, index])
        for window in _gathered(documents, _WINDOW_CHARACTERS):
            for place in draw.permutation(len(window)):
                yield window[place]

    def _write(self, number: int, groups: Iterable[Blocks]) -> WrittenFile | None:
        name = f"part-{number:05}.parquet"
        return _write_blocks(self._folder.below(name), name, groups)


def _encoded(documents: Iterable[Document], encoder: Encoder) -> Iterator[Example]:
    for batch in _gathered(documents, _BATCH_CHARACTERS, _BATCH_DOCUMENTS):
        yield from encoder(batch)


def _gathered(
    documents: Iterable[Document], most_characters: int, most: int | None = None
) -> Iterator[list[Document]]:
    """Yield documents in lists of about so many characters."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(len(str(value)) for value in document.fields.values())
        if characters >= most_characters or len(batch) == most:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_blocks(place: Place, name: str, groups: Iterable[Blocks]) -> WrittenFile | None:
    """Write groups of blocks to a file; none at all where there is no block."""
    blocks = iter(groups)
    group = next(blocks, None)
    if group is None:
        return None
    num_blocks = num_targets = max_token = 0
    try:
        sink = _Digesting(place)
        # Tokens have no order that a dictionary would find, and level 1 is three times as fast.
        with (
            sink,
            pq.ParquetWriter(
                sink, _SCHEMA, compression="zstd", compression_level=1, use_dictionary=False
            ) as writer,
        ):
            while group is not None:
                writer.write_table(_table(group))
                num_blocks += len(group["labels"])
                num_targets += int((group["labels"] != IGNORED).sum())
                max_token = max(max_token, int(group["input_ids"].max()))
                group = next(blocks, None)
    except OSError as error:
        raise StorageError(f"{place.name} cannot be written: {reason(error)}") from error
    return WrittenFile(
        name=name,
        num_blocks=num_blocks,
        num_targets=num_targets,
        max_token=max_token,
        num_bytes=sink.num_bytes,
        digest=sink.digest,
    )


def _table(group: Blocks) -> pa.Table:
    columns = {}
    for name, blocks in group.items():
        offsets = np.arange(0, blocks.size + 1, blocks.shape[1], dtype=np.int32)
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(blocks.reshape(-1)))
    return pa.table(columns, schema=_SCHEMA)


class _Digesting:
    """A file being written that knows the digest and the size of what went in."""

    def __init__(self, place: Place) -> None:
        """Create the file, or empty it."""
        self._file = place.filesystem.open_output_stream(place.path)
        self._hasher = blake3.blake3()
        self.num_bytes = 0

    @property
    def closed(self) -> bool:
        """Whether nothing more can be written."""
        return bool(self._file.closed)

    @property
    def digest(self) -> str:
        """Digest of everything written so far."""
        return self._hasher.hexdigest()

    def write(self, data: bytes) -> int:
        """Append bytes."""
        self._hasher.update(data)
        self._file.write(data)
        self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """Leave it to the file when to write what it has."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> _Digesting:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()
