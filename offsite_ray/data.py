# SPDX-License-Identifier: Apache-2.0
"""Text to blocks of tokens: reading, tokenising, packing, and prepared Parquet directories.

A row has ``input_ids``, ``labels`` (-100 where nothing is to be predicted) and ``position_ids``
(from 0 in each document), all of ``block_size`` int32. Labels are not shifted: the one at ``t`` is
what the logits at ``t - 1`` should predict, as in transformers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from offsite_ray.architectures import Notice, load_tokenizer
from offsite_ray.bundle import atomic_directory, check_free, digest_file
from offsite_ray.errors import DataError, StorageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from offsite_ray.config import PrepareConfig

IGNORED = -100
"""Label of a position where nothing is to be predicted."""

DATA_MANIFEST = "offsite-data.json"
BLOCKS_FILE = "blocks.parquet"
COLUMNS = ("input_ids", "labels", "position_ids")

_ROWS_PER_GROUP = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A document as tokens."""

    tokens: tuple[int, ...]
    targets: tuple[bool, ...]
    """Whether each token is to be predicted."""
    divisible: bool
    """Whether it may be cut at the end of a block: running text may, a completion may not."""


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
    tokenizer: str
    """Digest of the tokenizer's ``tokenizer.json``."""
    seconds: float


def is_prepared(source: str | Path) -> bool:
    """Return whether a path is a prepared directory."""
    return (Path(source) / DATA_MANIFEST).is_file()


def prepare(config: PrepareConfig, notice: Notice | None = None) -> PrepareResult:
    """Tokenise text and pack it into blocks, as a Parquet directory.

    Raises:
        DataError: A source cannot be read, or holds less than a block.
        StorageError: The tokenizer is missing, or ``out`` is taken.
    """
    return write_blocks(config.text, config.tokenizer, config.block_size, Path(config.out), notice)


def write_blocks(
    sources: Sequence[str],
    tokenizer_dir: str | Path,
    block_size: int,
    out: Path,
    notice: Notice | None = None,
) -> PrepareResult:
    """Write a prepared directory; see :func:`prepare`."""
    start = time.perf_counter()
    check_free(out)
    if block_size < 2:
        raise DataError(f"a block of {block_size} tokens predicts nothing; give at least 2")
    tokenizer = load_tokenizer(tokenizer_dir)
    packer = Packer(block_size=block_size, pad=tokenizer.pad_token_id or 0)
    with atomic_directory(out) as tmp:
        schema = pa.schema([(name, pa.list_(pa.int32())) for name in COLUMNS])
        with pq.ParquetWriter(tmp / BLOCKS_FILE, schema, compression="zstd") as writer:
            examples = (encode(document, tokenizer) for document in read_documents(sources))
            for rows in _groups(packer.blocks(examples)):
                columns = {name: [row[name] for row in rows] for name in COLUMNS}
                writer.write_table(pa.table(columns, schema=schema))
        packer.check(sources)
        if packer.num_truncated and notice is not None:
            notice(
                f"{packer.num_truncated} examples are longer than {block_size} tokens and were cut"
            )
        result = PrepareResult(
            out=str(out),
            num_blocks=packer.num_blocks,
            block_size=block_size,
            num_documents=packer.num_documents,
            num_tokens=packer.num_tokens,
            num_targets=packer.num_targets,
            num_truncated=packer.num_truncated,
            tokenizer=tokenizer_digest(tokenizer_dir),
            seconds=time.perf_counter() - start,
        )
        record = {key: value for key, value in asdict(result).items() if key != "out"}
        (tmp / DATA_MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return result


def tokenizer_digest(directory: str | Path) -> str:
    """Return the digest of a tokenizer's ``tokenizer.json``, by which two tokenizers compare."""
    file = Path(directory) / "tokenizer.json"
    if not file.is_file():
        raise StorageError(
            f"{directory} has no tokenizer.json; save its tokenizer with this transformers"
        )
    return digest_file(file)


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for row in rows:
        group.append(row)
        if len(group) == _ROWS_PER_GROUP:
            yield group
            group = []
    if group:
        yield group


class Packer:
    """Packs documents into blocks without gaps, and counts what it does."""

    def __init__(self, *, block_size: int, pad: int) -> None:
        """Start with nothing packed."""
        self.block_size = block_size
        self.pad = pad
        self.num_blocks = self.num_documents = self.num_tokens = 0
        self.num_targets = self.num_truncated = 0
        self._rows: dict[str, list[int]] = {name: [] for name in COLUMNS}
        self._divisible = True

    def blocks(self, examples: Iterable[Example]) -> Iterator[dict[str, Any]]:
        """Yield rows of int32 arrays of ``block_size``; the last is padded."""
        for example in examples:
            if not example.tokens:
                continue
            self.num_documents += 1
            self.num_tokens += len(example.tokens)
            self._divisible &= example.divisible
            yield from self._pack(example)
        if self._filled:
            yield self._take()

    def check(self, sources: Sequence[str]) -> None:
        """Refuse a text that does not fill a block; raise :class:`DataError`."""
        where = ", ".join(sources)
        if not self.num_targets:
            raise DataError(f"{where} holds nothing to predict; give a text that is not empty")
        if self._divisible and self.num_tokens < self.block_size:
            raise DataError(
                f"{where} has {self.num_tokens} tokens, fewer than a block of {self.block_size}; "
                "give more text or a smaller --seq-len (prepare: --block-size)"
            )

    @property
    def _filled(self) -> int:
        return len(self._rows["input_ids"])

    def _pack(self, example: Example) -> Iterator[dict[str, Any]]:
        tokens, targets = list(example.tokens), list(example.targets)
        if not example.divisible:
            if len(tokens) > self.block_size:
                self.num_truncated += 1
                tokens, targets = tokens[: self.block_size], targets[: self.block_size]
            if self._filled + len(tokens) > self.block_size:
                yield self._take()
        while tokens:
            room = self.block_size - self._filled
            self._add(tokens[:room], targets[:room])
            tokens, targets = tokens[room:], targets[room:]
            if self._filled == self.block_size:
                yield self._take()

    def _add(self, tokens: list[int], targets: list[bool]) -> None:
        # The first token of a piece has no context of its own, so it is nobody's target.
        wanted = [False, *targets[1:]]
        self.num_targets += sum(wanted)
        self._rows["input_ids"] += tokens
        self._rows["labels"] += [
            token if want else IGNORED for token, want in zip(tokens, wanted, strict=True)
        ]
        self._rows["position_ids"] += range(len(tokens))

    def _take(self) -> dict[str, Any]:
        padding = self.block_size - self._filled
        fill = {"input_ids": self.pad, "labels": IGNORED}
        row = {}
        for name in COLUMNS:
            tail = [fill[name]] * padding if name in fill else list(range(padding))
            row[name] = np.asarray(self._rows[name] + tail, dtype=np.int32)
        self._rows = {name: [] for name in COLUMNS}
        self.num_blocks += 1
        return row


def read_documents(sources: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield documents: ``{"text"}``, ``{"prompt", "completion"}`` or ``{"messages"}``.

    Args:
        sources: ``.txt`` (a document each), ``.jsonl`` and ``.parquet`` files, directories of them,
            or the name of a dataset (``name`` or ``name:config``; its ``train`` split).

    Raises:
        DataError: A source is missing, empty, or has rows of another form.
    """
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in READERS and p.is_file())
            if not files:
                raise DataError(f"{source} holds no file of {', '.join(READERS)}")
            for file in files:
                yield from _read_file(file)
        elif path.exists():
            yield from _read_file(path)
        elif path.suffix in READERS or path.is_absolute():
            raise DataError(f"{source} does not exist; give a file, a directory or a dataset")
        else:
            yield from _read_dataset(source)


def _read_file(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix not in READERS:
        raise DataError(f"{file} is none of {', '.join(READERS)}")
    try:
        for number, row in enumerate(READERS[file.suffix](file), start=1):
            yield _checked(row, f"{file}, row {number}")
    except (UnicodeDecodeError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read as {file.suffix}: {error}") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error


def _read_text(file: Path) -> Iterator[Any]:
    yield {"text": file.read_text(encoding="utf-8")}


def _read_jsonl(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _read_parquet(file: Path) -> Iterator[Any]:
    for batch in pq.ParquetFile(file).iter_batches():
        yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
"""File suffix to what yields its rows."""


def _read_dataset(name: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(*name.split(":"), split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _checked(row, f"{name}, row {number}")
    except DataError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{name} is no file, and no dataset either: {reason}") from error


def _checked(row: Any, where: str) -> dict[str, Any]:
    if isinstance(row, Mapping):
        for keys, form in ENCODERS.items():
            if all(isinstance(row.get(key), form) for key in keys):
                return dict(row)
    raise DataError(
        f'{where} is none of {{"text"}}, {{"prompt", "completion"}} (text) and {{"messages"}} '
        "(a list)"
    )


ENCODERS: dict[tuple[str, ...], type] = {
    ("prompt", "completion"): str,
    ("messages",): list,
    ("text",): str,
}
"""Columns of each form of document, the most specific first, and the type of their values."""


def encode(document: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Return a document as tokens, ended by the tokenizer's end of text where it has one."""
    if "messages" in document:
        return _encode_chat(document["messages"], tokenizer)
    if "completion" in document:
        return _encode_pieces(
            [(document["prompt"], False), (document["completion"], True)], tokenizer
        )
    tokens = [*_tokens(document["text"], tokenizer), *_end(tokenizer)]
    if len(tokens) == len(_end(tokenizer)):
        tokens = []
    return Example(tokens=tuple(tokens), targets=(True,) * len(tokens), divisible=True)


def _encode_pieces(
    pieces: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase
) -> Example:
    tokens: list[int] = []
    targets: list[bool] = []
    for text, wanted in pieces:
        piece = _tokens(text, tokenizer)
        tokens += piece
        targets += [wanted] * len(piece)
    end = _end(tokenizer)
    return Example(
        tokens=(*tokens, *end), targets=(*targets, *(True for _ in end)), divisible=False
    )


def _encode_chat(messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Return a conversation by the tokenizer's own template; the assistant's turns are targets."""
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, so {'messages'} cannot be told apart; give "
            "{'prompt', 'completion'} instead"
        )
    tokens: list[int] = []
    targets: list[bool] = []
    for turn in range(1, len(messages) + 1):
        try:
            wanted = messages[turn - 1]["role"] == "assistant"
            whole = _rendered(messages[:turn], tokenizer)
            opening = _rendered(messages[: turn - 1], tokenizer, opened=True) if wanted else []
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"the chat template refuses a conversation: {reason}") from error
        known = max(len(tokens), len(opening))
        targets += [False] * (known - len(tokens)) + [wanted] * (len(whole) - known)
        tokens = whole
        if len(targets) != len(tokens):
            raise DataError(
                "the chat template rewrites earlier turns, so the assistant's words cannot be told "
                "apart; give {'prompt', 'completion'} instead"
            )
    return Example(tokens=tuple(tokens), targets=tuple(targets), divisible=False)


def _rendered(
    messages: list[Any], tokenizer: PreTrainedTokenizerBase, *, opened: bool = False
) -> list[int]:
    """Return a conversation's tokens; ``opened``: with the beginning of the next answer."""
    if not messages:
        return []
    rendered: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=opened
    )
    return list(rendered["input_ids"])


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


class TokenBlocks:
    """The rows of a prepared directory (or some of them) as tensors, by index."""

    def __init__(self, columns: Mapping[str, Any], rows: Sequence[int]) -> None:
        """Take columns ``(N, T)`` and the indices of the rows that belong."""
        self._columns = columns
        self._rows = rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row: ``input_ids``, ``labels`` and ``position_ids``, each ``(T,)`` int64."""
        row = self._rows[index]
        return {
            name: torch.from_numpy(column[row].astype(np.int64))
            for name, column in self._columns.items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """A prepared directory, opened."""

    path: Path
    block_size: int
    num_blocks: int
    tokenizer: str


def open_prepared(path: str | Path, tokenizer_dir: str | Path, vocab_size: int) -> PreparedData:
    """Return a prepared directory that fits a model.

    Raises:
        DataError: It is damaged, or was made with another tokenizer.
    """
    file = Path(path) / DATA_MANIFEST
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        data = PreparedData(
            path=Path(path),
            block_size=int(record["block_size"]),
            num_blocks=int(record["num_blocks"]),
            tokenizer=str(record["tokenizer"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged: {error!r}; run 'offsite-ray prepare' again") from error
    if data.tokenizer != tokenizer_digest(tokenizer_dir):
        raise DataError(
            f"{path} was prepared with another tokenizer than that of {tokenizer_dir}; run "
            f"'offsite-ray prepare --tokenizer {tokenizer_dir}'"
        )
    columns = read_columns(data.path)
    largest = int(columns["input_ids"].max())
    if largest >= vocab_size:
        raise DataError(
            f"{path} holds token {largest}, and the model knows {vocab_size}: the tokenizer does "
            "not belong to it"
        )
    return data


def read_columns(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the columns of a prepared directory as int32 arrays of shape ``(N, T)``."""
    try:
        table = pq.read_table(path / BLOCKS_FILE, columns=list(COLUMNS), memory_map=True)
        arrays = {}
        for name in COLUMNS:
            flat = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
            arrays[name] = flat.reshape(table.num_rows, -1)
        return arrays
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path / BLOCKS_FILE} is damaged: {error}") from error


def split_blocks(path: Path, eval_fraction: float, seed: int) -> tuple[TokenBlocks, TokenBlocks]:
    """Return the rows to train on and the held-out ones, drawn by ``seed``.

    Raises:
        DataError: There are not two rows, one for each.
    """
    columns = read_columns(path)
    count = len(columns["input_ids"])
    if count < 2:
        raise DataError(
            f"the data makes {count} block, and one is held out for evaluation; give more text or a "
            "smaller --seq-len"
        )
    order = np.random.default_rng(seed).permutation(count)
    num_held_out = min(count - 1, max(1, round(count * eval_fraction)))
    return (
        TokenBlocks(columns, np.sort(order[num_held_out:]).tolist()),
        TokenBlocks(columns, np.sort(order[:num_held_out]).tolist()),
    )
