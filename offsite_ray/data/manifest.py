# SPDX-License-Identifier: Apache-2.0
"""The manifest ``offsite-data.json``: what prepared data is, what it was made with, its digests."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from offsite_ray import __version__
from offsite_ray.bundle.digest import digest_plain
from offsite_ray.data.writing import WrittenFile
from offsite_ray.errors import DataError
from offsite_ray.results import to_plain
from offsite_ray.storage import DATA_MANIFEST

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class DataManifest:
    """What ``offsite-data.json`` holds."""

    tokenizer: str
    """Digest of the tokenizer's ``tokenizer.json``."""
    block_size: int
    seed: int | None
    """Of the order of the documents; None: that of the sources."""
    num_blocks: int
    num_documents: int
    num_tokens: int
    """Of the documents; what was cut off is counted, padding is not."""
    num_targets: int
    """Tokens that are to be predicted."""
    num_truncated: int
    """Completions that were longer than a block and lost their end."""
    max_token: int
    files: tuple[WrittenFile, ...]
    """Files of blocks, in the order of the blocks."""
    tool: str = f"offsite_ray {__version__}"
    schema_version: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """Digest of the blocks and of how they came about, wherever the files lie."""
        nameless = tuple(replace(file, name="") for file in self.files)
        return digest_plain(to_plain(replace(self, files=nameless, tool="")))

    def below(self, folder: str) -> DataManifest:
        """Return the manifest of the same files in a folder."""
        files = tuple(replace(file, name=f"{folder}/{file.name}") for file in self.files)
        return replace(self, files=files)

    def to_text(self) -> str:
        """Return the manifest as the file holds it."""
        return json.dumps({**to_plain(self), "digest": self.digest}, indent=2) + "\n"


def read_data_manifest(folder: Path) -> DataManifest:
    """Return the manifest of a prepared directory, checked in itself; its files are not read.

    Raises:
        DataError: It is missing, damaged, or of another version.
    """
    path = folder / DATA_MANIFEST
    again = "run 'offsite-ray prepare' again"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{path} has schema version {version!r}, this version reads {SCHEMA_VERSION}; "
                f"{again}"
            )
        digest = values.pop("digest")
        manifest = _from_json(values)
        altered = manifest.digest != digest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error!r}; {again}") from error
    if altered:
        raise DataError(f"{path} is damaged: it does not have the digest that it names; {again}")
    return manifest


def _from_json(values: dict[str, Any]) -> DataManifest:
    files = tuple(WrittenFile(**file) for file in values["files"])
    for file in files:
        name = PurePosixPath(file.name)
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"it names the file {file.name!r}, which is not below it")
    return DataManifest(**{**values, "files": files})
