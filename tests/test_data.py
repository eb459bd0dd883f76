# SPDX-License-Identifier: Apache-2.0
"""Text to blocks: what is read, what is predicted, what is kept apart, what is refused."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import processors
from transformers import AutoConfig

from offsite_ray.architectures import load_config, load_tokenizer
from offsite_ray.config import FinetuneConfig
from offsite_ray.data import (
    IGNORED,
    PrepareResult,
    blocks,
    open_prepared,
    split_blocks,
    write_blocks,
)
from offsite_ray.data.documents import Document
from offsite_ray.data.encoding import Encoder, Example
from offsite_ray.data.packing import COLUMNS
from offsite_ray.data.parts import Piece
from offsite_ray.errors import DataError, ResumeError
from offsite_ray.finetuning import finetune
from offsite_ray.storage import DATA_MANIFEST
from offsite_ray.training import LanguageModelLoss, run_here
from offsite_ray.training.batches import collate
from offsite_ray.training.sources import prepared_for, row_length
from tests.damage import edit_json
from tests.loops import Loop, Stopped, ignore, stop_after
from tests.texts import CHAT, DOCUMENTS, TALK, columns_of, save_tokenizer, write_rows
from tests.tiny_models import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

END = 0
FIRST = "part-00000.parquet"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tokenizer of one token to a character, with a chat template."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tokenizer_dir)


def made(
    source: Path | str, tokenizer_dir: Path, out: Path, block_size: int = 8
) -> tuple[PrepareResult, dict[str, list[list[int]]]]:
    result = write_blocks([str(source)], tokenizer_dir, block_size, out)
    return result, columns_of(out)


def encode(document: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
    piece = Piece(name="rows.jsonl", form=".parquet")
    (example,) = Encoder(tokenizer)([Document(document, piece, 6)])
    return example


def predicted(document: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a document with everything that is not to be predicted as ``_``."""
    example = encode(document, tokenizer)
    shown = [
        str(tokenizer.decode([token])) if wanted else "_"
        for token, wanted in zip(example.tokens, example.targets, strict=True)
    ]
    return "".join(shown)


# What is predicted


@pytest.mark.parametrize(
    ("document", "shown"),
    [
        ({"text": "abc"}, "abc<|endoftext|>"),
        ({"text": ""}, ""),
        ({"prompt": "ask", "completion": "told"}, "___told<|endoftext|>"),
        ({"prompt": "", "completion": "b"}, "b<|endoftext|>"),
        ({"messages": TALK}, "_" * len("[u]hi;[a]") + "yo;" + "_" * len("[u]and;[a]") + "so;"),
        ({"messages": TALK[:1]}, "_" * len("[u]hi;")),
        ({"messages": []}, ""),
    ],
)
def test_only_completions_and_answers_are_predicted(
    tokenizer: PreTrainedTokenizerBase, document: dict[str, Any], shown: str
) -> None:
    assert predicted(document, tokenizer) == shown


def test_a_document_begins_as_a_text_that_is_evaluated(tokenizer_dir: Path) -> None:
    from offsite_ray.evaluation.perplexity import encode as encode_held_out

    tokenizer: Any = load_tokenizer(tokenizer_dir)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> <|endoftext|> $A <|endoftext|>",
        special_tokens=[("<|endoftext|>", 0), ("<unk>", 1)],
    )
    (held_out,) = encode_held_out(tokenizer, ["abc"])
    assert tuple(encode({"text": "abc"}, tokenizer).tokens) == held_out.token_ids
    completion = encode({"prompt": "a", "completion": "bc"}, tokenizer)
    assert tuple(completion.tokens) == held_out.token_ids
    assert completion.targets.tolist() == [False, False, False, True, True, True]
    assert not len(encode({"text": ""}, tokenizer).tokens)


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        ("{{ messages[-1]['content'] }}", TALK, "rewrites earlier turns"),
        ("{{ messages | length }}{{ messages[0]['content'] }}", TALK, "rewrites earlier turns"),
        ("{{ raise_exception('no\nsystem role') }}", TALK, "refuses a conversation: no"),
        (CHAT, [{"content": "hi"}], '"role"'),
        (CHAT, ["hi"], '"role"'),
        (CHAT, [{"role": "assistant", "text": "hi"}], '"content"'),
        (None, TALK, "no chat template"),
    ],
)
def test_conversations_that_cannot_be_told_apart_are_refused(
    tokenizer_dir: Path, template: str | None, messages: list[Any], said: str
) -> None:
    tokenizer: Any = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=said) as caught:
        encode({"messages": messages}, tokenizer)
    assert "\n" not in str(caught.value)


# Packing


def test_documents_are_packed_without_gaps_each_with_its_own_positions(
    tokenizer_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"text": "abc"}, {"text": ""}, {"text": "defgh"}]
    result, columns = made(write_rows(tmp_path / "a.jsonl", rows), tokenizer_dir, tmp_path / "out")
    text = "abc<|endoftext|>defgh<|endoftext|>"
    a, b, c, _, d, e, f, g, h, _ = ids = tokenizer(text)["input_ids"]
    none = IGNORED
    assert columns == {
        "input_ids": [ids[:8], [h, END, *[tokenizer.pad_token_id] * 6]],
        "labels": [[none, b, c, END, none, e, f, g], [none, END, *[none] * 6]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5]],
    }
    assert (a, d) == (ids[0], ids[4])
    assert (result.num_blocks, result.num_documents, result.num_tokens) == (2, 2, 10)
    assert result.num_targets == 7


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_document_sees_another(tokenizer_dir: Path, tmp_path: Path, family: str) -> None:
    texts = ["The cat sat.", "A dog", "and a bird that sings"]
    rows = [{"prompt": "", "completion": text} for text in texts]
    model = LanguageModelLoss(tiny_model(family), use_positions=True)

    @torch.no_grad()
    def loss(name: str, *rows: dict[str, Any]) -> float:
        source = write_rows(tmp_path / f"{name}.jsonl", list(rows))
        _, columns = made(source, tokenizer_dir, tmp_path / name, 48)
        assert len(columns["input_ids"]) == 1
        row = {name: torch.tensor(column[0]) for name, column in columns.items()}
        return float(model(**collate([row], torch.device("cpu")))["lm"])

    alone = [loss(str(index), row) for index, row in enumerate(rows)]
    assert loss("packed", *rows) == pytest.approx(sum(alone), rel=1e-5)


@pytest.mark.parametrize(
    ("length", "num_blocks", "num_targets"),
    [(7, 1, 7), (8, 2, 7), (15, 2, 14), (16, 3, 14)],
)
def test_running_text_goes_on_in_the_next_block(
    tokenizer_dir: Path, tmp_path: Path, length: int, num_blocks: int, num_targets: int
) -> None:
    (tmp_path / "a.txt").write_text("a" * length)
    result, columns = made(tmp_path / "a.txt", tokenizer_dir, tmp_path / "out")
    assert (result.num_blocks, result.num_targets) == (num_blocks, num_targets)
    assert result.num_tokens == length + 1
    assert np.shape(columns["input_ids"]) == (num_blocks, 8)
    assert num_targets == sum(label != IGNORED for row in columns["labels"] for label in row)


def test_a_completion_is_never_cut_in_two(tokenizer_dir: Path, tmp_path: Path) -> None:
    pairs = [("ab", "cd"), ("e", "fgh"), ("a" * 6, "bcd")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    told: list[str] = []
    source = write_rows(tmp_path / "a.jsonl", rows)
    result = write_blocks([str(source)], tokenizer_dir, 8, tmp_path / "out", told.append)
    columns = columns_of(tmp_path / "out")
    assert columns["position_ids"][:2] == [[*range(5), *range(3)]] * 2
    assert (np.array(columns["labels"]) != IGNORED).sum(1).tolist() == [3, 4, 2]
    assert (result.num_blocks, result.num_truncated) == (3, 1)
    assert told == ["1 examples are longer than 8 tokens and were cut"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "nothing to predict"), ("a" * 6, "7 tokens, fewer than a block of 8"), ("a" * 7, None)],
)
def test_a_text_that_fills_no_block_is_refused(
    tokenizer_dir: Path, tmp_path: Path, text: str, said: str | None
) -> None:
    (tmp_path / "a.txt").write_text(text)
    if said is None:
        made(tmp_path / "a.txt", tokenizer_dir, tmp_path / "out")
        return
    with pytest.raises(DataError, match=said):
        made(tmp_path / "a.txt", tokenizer_dir, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


# Prepared data


def test_the_same_text_gives_the_same_blocks(tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = [*DOCUMENTS["text"] * 4, {"text": "and more"}]
    source = write_rows(tmp_path / "a.jsonl", rows)
    other = write_rows(tmp_path / "b.jsonl", rows[::-1])
    first, _ = made(source, tokenizer_dir, tmp_path / "1")
    again, _ = made(source, tokenizer_dir, tmp_path / "2")
    assert again.digest == first.digest
    files = [sorted((tmp_path / name).glob("*.parquet")) for name in ("1", "2")]
    assert [file.name for file in files[0]] == ["part-00000.parquet", "part-00001.parquet"]
    contents = [[file.read_bytes() for file in some] for some in files]
    assert contents[0] == contents[1]
    assert made(other, tokenizer_dir, tmp_path / "3")[0].digest != first.digest
    assert made(source, tokenizer_dir, tmp_path / "4", 16)[0].digest != first.digest
    opened = open_prepared(tmp_path / "1", tokenizer_dir, 128)
    assert (opened.digest, opened.tokenizer) == (first.digest, first.tokenizer)


def test_held_out_blocks_are_drawn_by_the_seed(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(map(chr, range(33, 126))))
    made(tmp_path / "a.txt", tokenizer_dir, tmp_path / "out")

    def drawn(fraction: float, seed: int) -> tuple[list[int], list[int]]:
        parts = split_blocks(tmp_path / "out", fraction, seed)
        first, second = ([int(p[i]["input_ids"][0]) for i in range(len(p))] for p in parts)
        return first, second

    train, held_out = drawn(0.25, 0)
    assert (len(train), len(held_out)) == (9, 3)
    assert not set(train) & set(held_out)
    assert drawn(0.25, 0) == (train, held_out)
    assert drawn(0.25, 1) != (train, held_out)
    assert [len(part) for part in drawn(0.0, 0)] == [11, 1]
    assert [len(part) for part in drawn(0.99, 0)] == [1, 11]


def _truncate(data: Path) -> None:
    file = data / FIRST
    file.write_bytes(file.read_bytes()[:-50])


def _change_a_token(data: Path) -> None:
    table = pq.read_table(data / FIRST)
    rows = table.to_pylist()
    rows[0]["input_ids"][0] += 1
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), data / FIRST)


def _manifest(edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda data: edit_json(data / DATA_MANIFEST, edit)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncate, "was altered"),
        (_change_a_token, "was altered"),
        (lambda data: (data / FIRST).unlink(), "is missing"),
        (lambda data: (data / DATA_MANIFEST).write_text("{"), "is damaged"),
        (_manifest(lambda v: v.pop("digest")), "is damaged: KeyError"),
        (_manifest(lambda v: v.pop("files")), "is damaged: KeyError"),
        (_manifest(lambda v: v.update(max_token=3)), "does not have the digest that it names"),
        (_manifest(lambda v: v["files"][0].update(name="../part.parquet")), "not below it"),
        (_manifest(lambda v: v.update(schema_version=2)), "schema version 2, this version reads 1"),
        (_manifest(lambda v: v.pop("schema_version")), "schema version None"),
    ],
)
def test_damaged_data_is_refused(
    tokenizer_dir: Path, tmp_path: Path, damage: Any, said: str
) -> None:
    (tmp_path / "a.txt").write_text("a" * 20)
    made(tmp_path / "a.txt", tokenizer_dir, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(DataError, match=said):
        open_prepared(tmp_path / "out", tokenizer_dir, 128)


def test_blocks_are_read_when_they_are_asked_for(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_GROUPS_IN_MEMORY", 8)
    (tmp_path / "a.txt").write_text("The cat sat. " * 100_000)
    result, _ = made(tmp_path / "a.txt", tokenizer_dir, tmp_path / "out", 512)
    num_bytes = 12 * result.num_blocks * 512
    before = pa.total_allocated_bytes()
    train, held_out = split_blocks(tmp_path / "out", 0.1, 0)
    assert len(train) + len(held_out) == result.num_blocks
    assert pa.total_allocated_bytes() == before
    largest = 0
    order = np.random.default_rng(0).permutation(len(train))
    for index in order:
        assert train[int(index)]["input_ids"].shape == (512,)
        largest = max(largest, pa.total_allocated_bytes() - before)
    assert 0 < largest < num_bytes / 3, "as much as the text is held in memory"
    copy = pickle.loads(pickle.dumps(train))
    index = int(order[0])
    assert all(torch.equal(copy[index][name], train[index][name]) for name in COLUMNS)


def test_a_file_that_is_damaged_meanwhile_is_named(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 20)
    made(tmp_path / "a.txt", tokenizer_dir, tmp_path / "out")
    train, _ = split_blocks(tmp_path / "out", 0.5, 0)
    _truncate(tmp_path / "out")
    with pytest.raises(DataError, match=f"{FIRST} is damaged"):
        [train[index] for index in range(len(train))]


def test_data_of_another_tokenizer_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 20)
    made(tmp_path / "a.txt", tokenizer_dir, tmp_path / "out")
    tiny_tokenizer(64).save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="another tokenizer than that of"):
        open_prepared(tmp_path / "out", tmp_path / "other", 128)
    with pytest.raises(DataError, match="holds token 68, and the model knows 68"):
        open_prepared(tmp_path / "out", tokenizer_dir, 68)


def test_a_model_without_positions_takes_rows_of_any_length() -> None:
    bloom = AutoConfig.for_model("bloom")
    assert row_length(bloom, None, None) == 1024
    assert row_length(bloom, 4096, None) == row_length(bloom, None, 4096) == 4096


def test_what_is_named_as_data_is_prepared_for_the_model(loop: Loop, tmp_path: Path) -> None:
    config = load_config(loop.model)

    def prepared(*sources: Path, seq_len: int | None = None) -> tuple[Path, int]:
        names = [str(source) for source in sources]
        data = prepared_for(names, loop.model, config, seq_len, tmp_path / "run", None)
        return data.path, data.block_size

    own = (tmp_path / "run/data").resolve()
    assert prepared(loop.text) == (own, 64)
    shutil.rmtree(own)
    assert prepared(loop.text, loop.rows, seq_len=16) == (own, 16)
    assert prepared(own) == (own, 16)


def test_a_run_is_not_resumed_on_other_data(loop: Loop, tmp_path: Path) -> None:
    def data(text: str) -> None:
        (tmp_path / "a.txt").write_text(text * 200)
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        write_blocks([str(tmp_path / "a.txt")], loop.bundle, 16, tmp_path / "data")

    given = FinetuneConfig(
        bundle=str(loop.bundle),
        data=(str(tmp_path / "data"),),
        out=str(tmp_path / "out"),
        max_steps=4,
        batch_size=2,
        checkpoint_every=1,
    )
    resumed = dataclasses.replace(given, resume=True)
    data("abc ")
    with pytest.raises(Stopped):
        finetune(given, run_here, stop_after(2))
    data("abd ")
    with pytest.raises(ResumeError, match="data was"):
        finetune(resumed, run_here, ignore)
    data("abc ")
    finetune(resumed, run_here, ignore)
