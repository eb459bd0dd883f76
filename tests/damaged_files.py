# SPDX-License-Identifier: Apache-2.0
"""Bundles of any kind as nobody should accept them: one row per way to be malformed."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import BundleError, IntegrityError, OffsiteError, StorageError
from tests.damage import (
    MANIFEST,
    edit_header,
    edit_json,
    join_safetensors,
    reseal,
    split_safetensors,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WEIGHTS = "model.safetensors"
DEEP = "[" * 200_000 + "]" * 200_000
"""JSON that a recursive parser cannot follow."""


@dataclass(frozen=True)
class Row:
    """One malformed directory."""

    name: str
    damage: Callable[[Path], object]
    """Turns a good directory into it."""
    word: str
    """In the message."""
    error: type[OffsiteError] = IntegrityError


def a_matrix(header: dict[str, Any]) -> dict[str, Any]:
    """Return the header's entry of a matrix with tensors before and behind it in the file."""
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: entry["data_offsets"])
    found: dict[str, Any] = next(entry for entry in entries[2:] if len(entry["shape"]) == 2)
    return found


def sealed(damage: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return the damage with digests that fit again."""

    def both(directory: Path) -> None:
        damage(directory)
        reseal(directory)

    return both


def manifest_sealed(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return the damage of a manifest that still has the id of its content."""
    return lambda directory: reseal(directory, edit)


def manifest_text(text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / MANIFEST).write_text(text, encoding="utf-8")


def header(edit: Callable[[dict[str, Any]], object], name: str = WEIGHTS) -> Callable[[Path], None]:
    """Return the damage of a header that alone does not fit."""
    return sealed(lambda directory: edit_header(directory / name, edit))


def entry(edit: Callable[[dict[str, Any]], object], name: str = WEIGHTS) -> Callable[[Path], None]:
    """Return the damage of one tensor's entry in a header."""
    return header(lambda values: edit(a_matrix(values)), name)


def header_text(text: bytes, name: str = WEIGHTS) -> Callable[[Path], None]:
    """Return the damage of a header that is replaced as a whole."""

    def damage(directory: Path) -> None:
        join_safetensors(directory / name, text, split_safetensors(directory / name)[1])

    return sealed(damage)


def header_length(length: int, name: str = WEIGHTS) -> Callable[[Path], None]:
    """Return the damage of a header that says another length than it has."""

    def damage(directory: Path) -> None:
        raw = (directory / name).read_bytes()
        (directory / name).write_bytes(length.to_bytes(8, "little") + raw[8:])

    return sealed(damage)


def cut_off(name: str, size: int = 10) -> Callable[[Path], None]:
    """Return the damage of a file that lost its last bytes."""

    def damage(directory: Path) -> None:
        raw = (directory / name).read_bytes()
        (directory / name).write_bytes(raw[:-size])

    return damage


def flip_a_byte(directory: Path) -> None:
    file = next(directory.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


def duplicate_tensor(directory: Path, name: str = WEIGHTS) -> None:
    """Name a tensor twice in the header, which most JSON readers would not notice."""
    text, data = split_safetensors(directory / name)
    values = json.loads(text)
    again = json.dumps(dict([next(i for i in values.items() if i[0] != "__metadata__")]))
    join_safetensors(directory / name, text.rstrip()[:-1] + b"," + again[1:].encode(), data)


def link(name: str) -> Callable[[Path], None]:
    """Return the damage of a file that is a link to its equal elsewhere."""

    def damage(directory: Path) -> None:
        elsewhere = directory.parent / f"elsewhere-{name}"
        (directory / name).rename(elsewhere)
        (directory / name).symlink_to(elsewhere)

    return damage


def write_pickle(directory: Path, name: str) -> None:
    (directory / name).write_bytes(pickle.dumps({"weight": [1.0]}))


def emptied(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def a_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("{}", encoding="utf-8")


def manifest_is_a_directory(directory: Path) -> None:
    (directory / MANIFEST).unlink()
    (directory / MANIFEST).mkdir()


def huge_manifest(directory: Path) -> None:
    with (directory / MANIFEST).open("r+b") as file:
        file.truncate(2**30)


def twice(directory: Path) -> None:
    """Say the kind twice; the last one counts in most JSON readers, the first in others."""
    text = (directory / MANIFEST).read_text(encoding="utf-8")
    (directory / MANIFEST).write_text('{"kind": "plugged_in_model", ' + text[1:], encoding="utf-8")


EVERY_BUNDLE = (
    # the files
    Row("byte-flipped", flip_a_byte, "altered"),
    Row("extra-file", lambda d: (d / "notes.txt").write_text("x"), "does not name"),
    Row("extra-directory", lambda d: (d / "custom_generate").mkdir(), "does not name"),
    Row("pickle-beside", lambda d: write_pickle(d, "pytorch_model.bin"), "does not name"),
    Row("pickle-listed", sealed(lambda d: write_pickle(d, "x.bin")), "never read"),
    Row("pkl-listed", sealed(lambda d: write_pickle(d, "x.pkl")), "never read"),
    Row("code-listed", sealed(lambda d: (d / "x.py").write_text("x = 1")), "never read"),
    Row("linked-manifest", link(MANIFEST), "link"),
    Row("empty-directory", emptied, "no offsite.json", BundleError),
    Row("missing-directory", shutil.rmtree, "no directory", StorageError),
    Row("file-for-directory", a_file, "no directory", StorageError),
    Row("manifest-is-a-directory", manifest_is_a_directory, "no offsite.json", BundleError),
    # the manifest
    Row("manifest-empty", manifest_text(""), "no JSON"),
    Row("manifest-no-json", manifest_text("{'kind': 1}"), "no JSON"),
    Row("manifest-binary", lambda d: (d / MANIFEST).write_bytes(b"\xff\x00" * 9), "no JSON"),
    Row("manifest-a-list", manifest_text("[]"), "schema version None", BundleError),
    Row("manifest-a-number", manifest_text("1"), "schema version None", BundleError),
    Row("manifest-deep", manifest_text(DEEP), "no JSON"),
    Row("manifest-huge", huge_manifest, "bytes"),
    Row("manifest-says-twice", twice, "twice"),
    Row(
        "future-schema",
        lambda d: edit_json(d / MANIFEST, lambda m: m.update(schema_version=2)),
        "schema version 2",
        BundleError,
    ),
    Row("no-schema", manifest_sealed(lambda m: m.pop("schema_version")), "None", BundleError),
    Row("id-altered", lambda d: edit_json(d / MANIFEST, lambda m: m.update(id="0" * 64)), "id"),
    Row(
        "plan-altered",
        lambda d: edit_json(d / MANIFEST, lambda m: m["plan"]["emulator"].pop()),
        "altered",
    ),
    Row("key-missing", manifest_sealed(lambda m: m.pop("recipe")), "no manifest|altered"),
    Row("key-unknown", manifest_sealed(lambda m: m.update(trust=True)), "trust"),
    Row("kind-unknown", manifest_sealed(lambda m: m.update(kind="full_model")), "full_model"),
    Row("kind-a-list", manifest_sealed(lambda m: m.update(kind=[])), "kind"),
    Row(
        "kind-swapped",
        manifest_sealed(lambda m: m.update(kind="plugged_in_model")),
        "plugged_in_model",
        BundleError,
    ),
    Row("not-a-number", manifest_sealed(lambda m: m["measured"].update(x=math.nan)), "manifest"),
    Row("files-a-list", manifest_sealed(lambda m: m.update(files=list(m["files"]))), "files"),
    Row("digest-a-number", manifest_sealed(lambda m: m["files"].update(a=1)), "files"),
    Row("carried-a-list", manifest_sealed(lambda m: m["full_model"].update(carried=[])), "carried"),
    Row("recipe-a-list", manifest_sealed(lambda m: m.update(recipe=[])), "recipe"),
    Row("measured-a-text", manifest_sealed(lambda m: m.update(measured="x")), "measured"),
    Row("dtypes-a-number", manifest_sealed(lambda m: m.update(dtypes=1)), "dtypes"),
    Row("family-a-list", manifest_sealed(lambda m: m["model"].update(family=["x"])), "family"),
    Row(
        "family-that-steers-a-terminal",
        manifest_sealed(lambda m: m["model"].update(family="gpt\x1b[2J\ud800")),
        "family",
    ),
    Row(
        "trained-against-a-number",
        manifest_sealed(lambda m: m.update(trained_against=1)),
        "trained_against",
    ),
    Row("model-a-text", manifest_sealed(lambda m: m.update(model="gpt2")), "manifest"),
    Row(
        "blocks-a-number",
        manifest_sealed(lambda m: m["model"].update(blocks=5, recognised="path")),
        "blocks",
    ),
    # the plan
    Row("plan-a-list", manifest_sealed(lambda m: m.update(plan=[])), "manifest"),
    Row("block-twice", manifest_sealed(lambda m: m["plan"]["emulator"].append(4)), "once"),
    Row(
        "block-in-both-roles", manifest_sealed(lambda m: m["plan"].update(emulator=[0])), "both|as"
    ),
    Row("block-outside", manifest_sealed(lambda m: m["plan"].update(adapter=[0, 6])), "block 6"),
    Row("block-negative", manifest_sealed(lambda m: m["plan"].update(adapter=[-1, 0])), "block -1"),
    Row("block-a-fraction", manifest_sealed(lambda m: m["plan"].update(adapter=[0.0])), "plan"),
    Row(
        "block-a-text", manifest_sealed(lambda m: m["plan"].update(adapter="035")), "plan|manifest"
    ),
    Row("no-blocks", manifest_sealed(lambda m: m["plan"].update(num_blocks="6")), "plan|manifest"),
    Row(
        "a-billion-blocks",
        manifest_sealed(lambda m: m["plan"].update(num_blocks=10**9)),
        "1000000000",
    ),
    # names of files that lead elsewhere
    Row("file-above", manifest_sealed(lambda m: m["files"].update({"../x.json": "0"})), "beside"),
    Row("file-absolute", manifest_sealed(lambda m: m["files"].update({"/etc/x": "0"})), "beside"),
    Row("file-below", manifest_sealed(lambda m: m["files"].update({"a/b.json": "0"})), "beside"),
    Row("file-nameless", manifest_sealed(lambda m: m["files"].update({"": "0"})), "beside"),
    Row("file-itself", manifest_sealed(lambda m: m["files"].update({MANIFEST: "0"})), "beside"),
    Row("file-nul", manifest_sealed(lambda m: m["files"].update({"a\0b.json": "0"})), "lacks"),
)
"""What no kind of bundle may be."""


def safetensors_rows(name: str) -> tuple[Row, ...]:
    """Return the ways in which the safetensors file of that name may be malformed."""
    return (
        Row("truncated", cut_off(name), "altered"),
        Row("truncated-sealed", sealed(cut_off(name)), "truncated"),
        Row("empty-file", sealed(lambda d: (d / name).write_bytes(b"")), "truncated"),
        Row("renamed", lambda d: (d / name).rename(d / "x.safetensors"), "lacks"),
        Row("removed", lambda d: (d / name).unlink(), "lacks"),
        Row("linked", link(name), "link"),
        Row("linked-sealed", sealed(link(name)), "link"),
        Row("pickle-inside", sealed(lambda d: write_pickle(d, name)), "header"),
        Row("trailing-bytes", sealed(lambda d: edit_header(d / name, len, b"x")), "appended"),
        Row("header-huge", header_length(2**63, name), "header"),
        Row("header-beyond-the-file", header_length(10**7, name), "header"),
        Row("header-short", header_length(5, name), "header"),
        Row("header-a-list", header_text(b"[]", name), "header"),
        Row("header-deep", header_text(DEEP.encode(), name), "header"),
        Row("header-binary", header_text(b"\xff\xfe{}", name), "header"),
        Row("header-empty", header_text(b"{}", name), "appended"),
        Row("name-twice", sealed(lambda d: duplicate_tensor(d, name)), "twice"),
        Row("dtype-unknown", entry(lambda e: e.update(dtype="F7"), name), "F7"),
        Row("dtype-a-list", entry(lambda e: e.update(dtype=[]), name), "bad header"),
        Row("dtype-smaller", entry(lambda e: e.update(dtype="BF16"), name), "bytes for"),
        Row("shape-negative", entry(lambda e: e.update(shape=[-1, -8]), name), "negative"),
        Row("shape-fractional", entry(lambda e: e.update(shape=[1.0]), name), "fractional"),
        Row("shape-a-flag", entry(lambda e: e.update(shape=[True]), name), "fractional"),
        Row("shape-a-text", entry(lambda e: e.update(shape="88"), name), "fractional"),
        Row("shape-huge", entry(lambda e: e.update(shape=[2**62, 8]), name), "bytes for"),
        Row("shape-missing", entry(lambda e: e.pop("shape"), name), "shape"),
        Row("offsets-reversed", entry(lambda e: e["data_offsets"].reverse(), name), "bad header"),
        Row("offsets-three", entry(lambda e: e["data_offsets"].append(0), name), "bad header"),
        Row("overlap", entry(lambda e: shift(e, -4), name), "overlaps"),
        Row("hole", entry(lambda e: shift(e, 4), name), "overlaps"),
        Row("entry-a-list", header(lambda h: h.update(x=[]), name), "bad header"),
    )


def shift(found: dict[str, Any], by: int) -> None:
    """Move a tensor in its file, or rather say so."""
    found["data_offsets"] = [offset + by for offset in found["data_offsets"]]
