# SPDX-License-Identifier: Apache-2.0
"""Names of artefacts: what is repeated of a URI, and which place it names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pyarrow.fs import AzureFileSystem, S3FileSystem

from offsite_ray.errors import ConfigError, StorageError
from offsite_ray.evaluation.task_loading import load_tasks
from offsite_ray.runs.record import run_directory
from offsite_ray.storage import Place, fetched, own_folder
from offsite_ray.uris import scrubbed, shown

if TYPE_CHECKING:
    from pathlib import Path

AZURE = "account.dfs.core.windows.net"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s3://KEY:SECRET@bucket/path?token=T", "s3://bucket/path"),
        ("s3://KEY:SE/CRET@bucket/path", "s3://bucket/path"),
        ("a=s3://KEY:SECRET@bucket/path", "a=s3://bucket/path"),
        ("https://TOKEN@host/path", "https://host/path"),
        (f"abfs://one@{AZURE}/path?k=v", f"abfs://one@{AZURE}/path"),
        (f"abfs://one:SECRET@{AZURE}/path", f"abfs://{AZURE}/path"),
        (f"abfs://:SECRET@{AZURE}/one/path", f"abfs://{AZURE}/one/path"),
        ("a/path of@this?machine", "a/path of@this?machine"),
    ],
)
def test_what_is_repeated_of_a_name(name: str, expected: str) -> None:
    assert shown(name) == expected
    assert scrubbed(f"no {name}; give another") == f"no {expected}; give another"


def test_each_place_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    s3, azure = S3FileSystem(region="us-east-1"), AzureFileSystem("account")

    def folder(name: str, filesystem: object, path: str) -> Path:
        return own_folder("runs", Place(filesystem, path, shown(name)), name)

    one = folder("s3://bucket/a/x", s3, "bucket/a/x")
    assert folder("s3://KEY:SECRET@bucket/a/x", s3, "bucket/a/x") == one
    assert folder("s3://bucket/a/x/", s3, "bucket/a/x") == one
    others = {
        folder("s3://bucket/me@a/x", s3, "bucket/me@a/x"),
        folder("s3://bucket/you@a/x", s3, "bucket/you@a/x"),
        folder("s3://bucket/a/x?endpoint_override=here", s3, "bucket/a/x"),
        folder(f"abfs://one@{AZURE}/x", azure, "one/x"),
        folder(f"abfs://two@{AZURE}/x", azure, "two/x"),
    }
    assert len(others - {one}) == 5


def test_what_a_uri_would_lose_is_refused() -> None:
    with pytest.raises(StorageError, match=r"^s3://bucket/a#b has a '#', .* written %23$"):
        fetched("s3://KEY:SECRET@bucket/a#b")
    with pytest.raises(StorageError, match=r"^file:///tmp/a b is on no .* written as %20 and the"):
        fetched("file:///tmp/a b")
    assert str(fetched("file:///tmp/a%20%23b")) == "/tmp/a #b"


def test_what_takes_a_path_alone_repeats_no_key() -> None:
    with pytest.raises(StorageError, match=r"not s3://bucket/runs: logs"):
        run_directory("s3://KEY:SECRET@bucket/runs", "one")
    with pytest.raises(ConfigError, match=r"^--task-path s3://bucket/tasks must be a path"):
        load_tasks(["mine"], task_path=["s3://KEY:SECRET@bucket/tasks"])
