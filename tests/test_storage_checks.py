# SPDX-License-Identifier: Apache-2.0
"""What a store refuses is found out early, and what it changes meanwhile is not kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from offsite_ray.errors import StorageError
from offsite_ray.storage import (
    check_replaceable,
    check_replaceable_files,
    check_untaken,
    fetched,
    fetching,
    published,
    transfer,
)

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_ray.storage import Place
    from tests.stores import Store


pytestmark = pytest.mark.usefixtures("empty_cache")


def test_who_may_write_below_a_prefix_alone_publishes_there(store: Store) -> None:
    def denied(method: str, path: str) -> bool:
        return method in ("PUT", "POST") and not path.startswith("/bucket/team/mine/")

    with store.fails(denied, "403 Forbidden"):
        check_untaken(store.uri("team/mine/model"))
        assert store.names("team/mine/model") == []
        with published(store.uri("team/mine/model")) as tmp:
            (tmp / "config.json").write_text("{}")
        with pytest.raises(StorageError, match=r"^s3://bucket/team/others/x\S* cannot be written"):
            check_untaken(store.uri("team/others/x"))


def test_a_result_that_could_not_be_written_is_refused_before(store: Store) -> None:
    store.write("results/a.json", b"{}")
    check_replaceable(store.uri("results/a.json"))
    check_replaceable_files(store.uri("results"))
    assert store.names("results") == ["a.json"]
    with pytest.raises(StorageError, match="--out s3://bucket/results is a directory"):
        check_replaceable(store.uri("results"))
    with pytest.raises(StorageError, match=r"--report s3://bucket/results/a\.json is no directory"):
        check_replaceable_files(store.uri("results/a.json"))
    for check in (check_replaceable, check_replaceable_files):
        with pytest.raises(StorageError, match=r"^s3://nothere/\S* cannot be written"):
            check(store.uri("x/y").replace("@bucket", "@nothere"))


def test_what_changes_while_it_is_fetched_is_not_kept(
    store: Store, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "model.safetensors"):
        store.write(f"moving/{name}", b"{}")

    def slow(source: Place, target: Path, size: int) -> str:
        store.write("moving/model.safetensors", b"longer")
        return transfer.download(source, target, size)

    monkeypatch.setattr(fetching, "download", slow)
    with pytest.raises(StorageError, match=r"^s3://bucket/moving was changed while it was read"):
        fetched(store.uri("moving"))
    assert list(empty_cache.glob("artefacts/*/*/moving")) == []
