# SPDX-License-Identifier: Apache-2.0
"""Prepared directories: written from text, opened for a model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from offsite_ray.architectures import Notice, load_tokenizer
from offsite_ray.bundle import digest_file
from offsite_ray.bundle.digest import digest_plain
from offsite_ray.data.manifest import DataManifest, read_data_manifest
from offsite_ray.data.parts import parts_of
from offsite_ray.data.publishing import publishing
from offsite_ray.data.writing import PartWriter, WrittenPart
from offsite_ray.errors import DataError, StorageError
from offsite_ray.storage import DATA_MANIFEST, fetched, place_of, retried, store_of
from offsite_ray.uris import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from offsite_ray.config import PrepareConfig
    from offsite_ray.data.parts import Part

WriteParts = Callable[[PartWriter], Generator[WrittenPart, None, None]]
"""Writes every part, in any order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartsRecord:
    """How far the writing of parts is."""

    num_done: int
    num_parts: int
    num_tokens: int
    """Tokens of the parts that are done."""
    tokens_per_s: float


ReportParts = Callable[[PartsRecord], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareResult:
    """What ``prepare`` made."""

    out: str
    num_blocks: int
    block_size: int
    num_documents: int
    num_tokens: int
    num_targets: int
    """Tokens that are to be predicted."""
    num_truncated: int
    """Completions that were longer than a block and lost their end."""
    num_files: int
    seed: int | None
    tokenizer: str
    """Digest of the tokenizer's ``tokenizer.json``."""
    digest: str
    """Digest of the blocks; the same text, tokenizer, block size and seed give the same."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """A prepared directory, opened."""

    path: Path
    block_size: int
    num_blocks: int
    tokenizer: str
    """Digest of the tokenizer that it was made with."""
    digest: str | None = None
    """Digest of the blocks; None for blocks that ``prepare`` did not write."""

    uri: str | None = None
    """Where it was fetched from, for other nodes; None: all see the directory."""

    @property
    def at_hand(self) -> Path:
        """Where it is on the machine of this process; rows are read in any order."""
        return self.path if self.uri is None else fetched(self.uri)


def write_here(writer: PartWriter) -> Generator[WrittenPart, None, None]:
    """Write every part in this process, in order."""
    yield from map(writer, range(len(writer.parts)))


def prepare(
    config: PrepareConfig,
    notice: Notice | None = None,
    *,
    write_parts: WriteParts = write_here,
    report: ReportParts | None = None,
) -> PrepareResult:
    """Tokenise text and pack it into blocks, as a directory of Parquet files.

    Args:
        config: What to make of what.
        notice: Told of what the user should know.
        write_parts: Writes the parts, here or elsewhere; the blocks are the same.
        report: Told of each part that is done.

    Raises:
        DataError: A source cannot be read, or holds less than a block.
        StorageError: The tokenizer is missing, or ``out`` is taken.
    """
    return write_blocks(
        config.text,
        config.tokenizer,
        config.block_size,
        config.out,
        notice,
        seed=config.seed,
        write_parts=write_parts,
        report=report,
    )


def write_blocks(
    sources: Sequence[str],
    tokenizer_dir: str | Path,
    block_size: int,
    out: str | Path,
    notice: Notice | None = None,
    *,
    seed: int | None = None,
    write_parts: WriteParts = write_here,
    report: ReportParts | None = None,
) -> PrepareResult:
    """Write a prepared directory; see :func:`prepare`."""
    start = time.perf_counter()
    target = place_of(str(out))
    if block_size < 2:
        raise DataError(f"a block of {block_size} tokens predicts nothing; give at least 2")
    with publishing(target) as publication:
        tokenizer_dir = fetched(tokenizer_dir)
        tokenizer = load_tokenizer(tokenizer_dir)
        digest = tokenizer_digest(tokenizer_dir)
        parts = _ordered(parts_of(sources), seed)
        writer = PartWriter(
            parts=parts,
            tokenizer=tokenizer,
            block_size=block_size,
            seed=seed,
            folder=publication.folder(digest_plain([digest, block_size, seed, _identity(parts)])),
        )
        with contextlib.closing(write_parts(writer)) as results:
            written = _followed(results, len(parts), report)
        manifest = _manifest(writer, written, digest, seed)
        _check(sources, manifest, divisible=all(part.divisible for part in written))
        publication.publish(manifest)
    if manifest.num_truncated and notice is not None:
        notice(
            f"{manifest.num_truncated} examples are longer than {block_size} tokens and were cut"
        )
    return PrepareResult(
        out=target.name,
        num_blocks=manifest.num_blocks,
        block_size=block_size,
        num_documents=manifest.num_documents,
        num_tokens=manifest.num_tokens,
        num_targets=manifest.num_targets,
        num_truncated=manifest.num_truncated,
        num_files=len(manifest.files),
        seed=seed,
        tokenizer=digest,
        digest=manifest.digest,
        seconds=time.perf_counter() - start,
    )


def _ordered(parts: tuple[Part, ...], seed: int | None) -> tuple[Part, ...]:
    if seed is None:
        return parts
    return tuple(parts[place] for place in np.random.default_rng(seed).permutation(len(parts)))


def _identity(parts: Sequence[Part]) -> list[list[object]]:
    """Return what tells the sources of a run from those of another."""
    return [
        [piece.name, piece.start, piece.stop, piece.num_bytes] for part in parts for piece in part
    ]


def _followed(
    written: Iterable[WrittenPart], num_parts: int, report: ReportParts | None
) -> list[WrittenPart]:
    """Return the results of all parts in their order, however they come, and report each."""
    start = time.perf_counter()
    done: list[WrittenPart] = []
    num_tokens = 0
    for part in written:
        done.append(part)
        num_tokens += part.num_tokens
        if report is not None:
            speed = num_tokens / (time.perf_counter() - start)
            report(
                PartsRecord(
                    num_done=len(done),
                    num_parts=num_parts,
                    num_tokens=num_tokens,
                    tokens_per_s=speed,
                )
            )
    return sorted(done, key=lambda part: part.index)


def _manifest(
    writer: PartWriter, written: Sequence[WrittenPart], tokenizer: str, seed: int | None
) -> DataManifest:
    """Write what the parts left over, and return the manifest of all files."""
    files = [part.file for part in written] + [writer.finish(written)]
    kept = tuple(file for file in files if file is not None)
    return DataManifest(
        tokenizer=tokenizer,
        block_size=writer.block_size,
        seed=seed,
        num_blocks=sum(file.num_blocks for file in kept),
        num_documents=sum(part.num_documents for part in written),
        num_tokens=sum(part.num_tokens for part in written),
        num_targets=sum(file.num_targets for file in kept),
        num_truncated=sum(part.num_truncated for part in written),
        max_token=max((file.max_token for file in kept), default=0),
        files=kept,
    )


def _check(sources: Sequence[str], manifest: DataManifest, *, divisible: bool) -> None:
    """Refuse a text that does not fill a block; raise :class:`DataError`."""
    where = ", ".join(place_of(source).name for source in sources)
    if not manifest.num_targets:
        raise DataError(f"{where} holds nothing to predict; give a text that is not empty")
    if divisible and manifest.num_tokens < manifest.block_size:
        raise DataError(
            f"{where} has {manifest.num_tokens} tokens, fewer than a block of "
            f"{manifest.block_size}; give more text or a smaller --seq-len (prepare: --block-size)"
        )


def is_prepared(source: str | Path) -> bool:
    """Return whether a path or a URI is a prepared directory.

    Raises:
        StorageError: The filesystem of the URI cannot be used.
    """
    place = place_of(str(source)).below(DATA_MANIFEST)
    return retried(place.is_file, place)


def open_prepared(path: str | Path, tokenizer_dir: str | Path, vocab_size: int) -> PreparedData:
    """Return prepared data, at a path or a URI, that fits a model, every file of it verified.

    Raises:
        DataError: It is damaged, or was made with another tokenizer.
    """
    folder = fetched(path)
    manifest = read_data_manifest(folder)
    if manifest.tokenizer != tokenizer_digest(tokenizer_dir):
        raise DataError(
            f"{shown(str(path))} was prepared with another tokenizer than that of {tokenizer_dir}; "
            f"run 'offsite-ray prepare --tokenizer {tokenizer_dir}'"
        )
    check_files(folder, manifest)
    if manifest.max_token >= vocab_size:
        raise DataError(
            f"{shown(str(path))} holds token {manifest.max_token}, and the model knows "
            f"{vocab_size}: the tokenizer does not belong to it"
        )
    return PreparedData(
        path=folder.resolve(),
        block_size=manifest.block_size,
        num_blocks=manifest.num_blocks,
        tokenizer=manifest.tokenizer,
        digest=manifest.digest,
        uri=None if store_of(path) is None else str(path),
    )


def check_files(folder: Path, manifest: DataManifest) -> None:
    """Check every file of a prepared directory; raise :class:`DataError` for one that is not."""
    for file in manifest.files:
        blocks = folder / file.name
        if not blocks.is_file() or digest_file(blocks) != file.digest:
            raise DataError(f"{blocks} is missing or was altered; run 'offsite-ray prepare' again")


def tokenizer_digest(directory: str | Path) -> str:
    """Return the digest of a tokenizer's ``tokenizer.json``, by which two tokenizers compare."""
    file = Path(directory) / "tokenizer.json"
    if not file.is_file():
        raise StorageError(
            f"{directory} has no tokenizer.json; save its tokenizer with this transformers"
        )
    return digest_file(file)
