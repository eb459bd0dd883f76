# SPDX-License-Identifier: Apache-2.0
"""Sources to documents: every form, every filesystem, in any number of parts."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offsite_ray.data import parts, place_of, read_documents
from offsite_ray.data.documents import read_piece
from offsite_ray.data.parts import parts_of
from offsite_ray.errors import DataError, StorageError
from tests.texts import DOCUMENTS, MORE_COLUMNS, write_rows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

many_examples = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what sets the size of a part, and of a text that stays one document."""

    def set_bytes(number: int) -> None:
        monkeypatch.setattr(parts, "_PART_BYTES", number)
        monkeypatch.setattr(parts, "_DOCUMENT_BYTES", number)

    return set_bytes


def texts(*sources: Path | str) -> list[str]:
    return [document["text"] for document in read_documents([str(source) for source in sources])]


def failure(source: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        texts(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Forms


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("form", list(DOCUMENTS))
def test_rows_are_read_without_what_is_not_theirs(tmp_path: Path, form: str, suffix: str) -> None:
    rows = [{**row, **(MORE_COLUMNS if form == "more columns" else {})} for row in DOCUMENTS[form]]
    file = write_rows(tmp_path / f"rows{suffix}", rows)
    assert list(read_documents([str(file)])) == DOCUMENTS[form]


def test_a_text_file_is_one_document_and_a_folder_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("first line\n\nsecond \u00fc", encoding="utf-8")
    write_rows(tmp_path / "deep/a.jsonl", DOCUMENTS["text"])
    (tmp_path / "notes.md").write_text("no data")
    (tmp_path / "deep/circle").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    text = {"text": "first line\n\nsecond \u00fc"}
    assert list(read_documents([str(tmp_path / "b.txt")])) == [text]
    assert list(read_documents([str(tmp_path)])) == [text, *DOCUMENTS["text"]]


def test_lines_end_as_in_text_mode(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    (tmp_path / "empty.txt").touch()
    assert texts(tmp_path / "a.txt") == ["one\ntwo\nthree\n"]
    assert texts(tmp_path / "empty.txt") == [""]


def test_a_dataset_is_read_by_name_and_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "corpus/en/1.jsonl", DOCUMENTS["text"])
    write_rows(tmp_path / "corpus/en/2.jsonl", [{"text": "three"}, {"text": None}])
    write_rows(tmp_path / "corpus/chat/rows.jsonl", DOCUMENTS["messages"])
    (tmp_path / "corpus/README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: en\n  data_files: en/*.jsonl\n"
        "- config_name: chat\n  data_files: chat/rows.jsonl\n---\n"
    )
    assert list(read_documents(["corpus:chat"])) == DOCUMENTS["messages"]
    assert "no dataset either" in failure("corpus:fr")
    first, second = parts_of(["corpus:en"])
    assert [document.fields for document in read_piece(first[0])] == DOCUMENTS["text"]
    with pytest.raises(DataError, match="corpus:en, row 2 of shard 2 is none of"):
        list(read_piece(second[0]))


# Parts

lines = st.lists(
    st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.none()),
    max_size=12,
)


@many_examples
@given(lines=lines, size=st.integers(1, 40), last=st.booleans(), ending=st.sampled_from("\n \r\n"))
def test_no_line_is_lost_or_read_twice(
    tmp_path: Path, small_parts: Any, lines: list[str | None], size: int, last: bool, ending: str
) -> None:
    rows = [
        "" if text is None else json.dumps({"text": text}, ensure_ascii=False) for text in lines
    ]
    end = ending.strip(" ") or "\n"
    end = end if end.endswith("\n") else f"{end}\n"
    written = end.join(rows) + (end if last else "")
    (tmp_path / "a.jsonl").write_bytes(written.encode())
    small_parts(size)
    assert texts(tmp_path / "a.jsonl") == [text for text in lines if text is not None]


@many_examples
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=60),
    size=st.integers(1, 40),
)
def test_a_long_text_is_cut_but_complete(
    tmp_path: Path, small_parts: Any, text: str, size: int
) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    small_parts(size)
    pieces = texts(tmp_path / "a.txt")
    assert "".join(pieces) == text
    behind = ("".join(pieces[index + 1 :]) for index in range(len(pieces)))
    for piece, rest in zip(pieces, behind, strict=True):
        assert not piece or piece.endswith("\n") or "\n" not in rest


def test_small_files_share_a_part_and_large_ones_are_cut(tmp_path: Path, small_parts: Any) -> None:
    for index in range(9):
        write_rows(tmp_path / f"{index}.jsonl", [{"text": f"document {index}"}])
    size = (tmp_path / "0.jsonl").stat().st_size
    small_parts(3 * size)
    assert [len(part) for part in parts_of([str(tmp_path)])] == [3, 3, 3]
    write_rows(tmp_path / "5.jsonl", [{"text": f"document {index}"} for index in range(20)])
    read = [piece.name for part in parts_of([str(tmp_path)]) for piece in part]
    assert read.count(str(tmp_path / "5.jsonl")) == 7
    assert texts(tmp_path) == texts(*(tmp_path / f"{index}.jsonl" for index in range(9)))


def test_a_large_parquet_file_is_read_by_row_groups(tmp_path: Path, small_parts: Any) -> None:
    rows = [{"text": f"document {index}", "vector": [index] * 9} for index in range(50)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=20)
    small_parts(1)
    assert len(parts_of([str(tmp_path / "a.parquet")])) == 3
    assert texts(tmp_path / "a.parquet") == [row["text"] for row in rows]


def test_parts_grow_with_the_corpus(
    tmp_path: Path, small_parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "abc"}] * 500)
    monkeypatch.setattr(parts, "_MOST_PARTS", 10)
    small_parts(1)
    assert len(parts_of([str(tmp_path / "a.jsonl")])) == 10


# What is wrong is said with its place, wherever a part begins


@pytest.mark.parametrize("size", [10, 2**20])
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"text": "a', "line 40 is no JSON: Unterminated string starting at (column 10)"),
        ("[" * 100_000, "line 40 is no JSON: maximum recursion"),
        ('{"body": "a"}', 'line 40 is none of {"text"}'),
        ('{"text": 7}', 'line 40 is none of {"text"}'),
        ('{"text": "\udcff"}', "line 40 is no JSON: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_bad_line_has_its_number(
    tmp_path: Path, small_parts: Any, row: str, said: str, size: int
) -> None:
    rows = [*['{"text": "good"}', ""] * 19, '{"text": "good"}', row]
    (tmp_path / "a.jsonl").write_bytes("\n".join(rows).encode(errors="surrogateescape"))
    small_parts(size)
    assert failure(tmp_path / "a.jsonl").startswith(f"{tmp_path / 'a.jsonl'}, {said}")


def test_a_bad_row_of_a_row_group_has_its_number(tmp_path: Path, small_parts: Any) -> None:
    rows = [{"text": None if index == 33 else "good"} for index in range(50)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=20)
    small_parts(1)
    assert f"{tmp_path / 'a.parquet'}, row 34 is none of" in failure(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    assert "b.parquet cannot be read as .parquet" in failure(tmp_path / "b.parquet")


# Places


@pytest.fixture
def memory() -> Iterator[str]:
    """Return the URI of a directory on a filesystem that only fsspec has."""
    name = f"memory://{uuid.uuid4().hex}"
    yield name
    place = place_of(name)
    if place.is_directory():
        place.filesystem.delete_dir(place.path)


def test_a_uri_names_what_a_path_names(tmp_path: Path, memory: str) -> None:
    write_rows(tmp_path / "deep/a.jsonl", DOCUMENTS["text"])
    write_rows(tmp_path / "b.parquet", [{"text": "three"}])
    assert texts(f"file://{tmp_path}") == ["three", "one", "two"]
    elsewhere = place_of(memory)
    for name in ("deep/a.jsonl", "b.parquet"):
        with elsewhere.filesystem.open_output_stream(elsewhere.below(name).path) as file:
            file.write((tmp_path / name).read_bytes())
    assert texts(memory) == ["three", "one", "two"]
    assert texts(f"{memory}/deep/a.jsonl") == ["one", "two"]
    assert failure(f"{memory}/nothing") == (
        f"{memory}/nothing does not exist; give a file, a directory or a dataset"
    )


def test_an_unknown_filesystem_is_named_without_its_key() -> None:
    with pytest.raises(StorageError, match="of pyarrow") as caught:
        texts("nosuchstore://key:secret@bucket/texts?token=abc")
    assert str(caught.value).startswith("nosuchstore://bucket/texts is on no filesystem")
    assert "secret" not in str(caught.value)
