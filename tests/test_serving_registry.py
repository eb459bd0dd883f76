# SPDX-License-Identifier: Apache-2.0
"""Tenants, versions and keys: as they were after a restart, all or nothing of a change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from offsite_ray.errors import ConfigError, MissingError, RegistryError, StorageError
from offsite_ray.serving.registry import Registry, Version, hash_of

if TYPE_CHECKING:
    from pathlib import Path


def added(registry: Registry, tenant: str, content: str = "x") -> Version:
    bundle = registry.root / "uploaded"
    bundle.mkdir()
    (bundle / "offsite.json").write_text(content)
    return registry.add(tenant, bundle, id=f"id-{content}", method="full", size=len(content))


def test_everything_is_as_it_was_after_a_restart(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    added(registry, "acme", "one")
    second = added(registry, "acme", "two")
    other = added(registry, "globex", "three")
    registry.pin("globex", pinned=True)
    key = registry.add_key("service", models=["acme"], per_minute=60)
    before = registry.snapshot()
    registry.close()
    after = Registry(tmp_path).snapshot()
    assert after == before
    assert after.tenants == {"acme": second, "globex": other}
    assert (tmp_path / "bundles" / str(second.number) / "offsite.json").read_text() == "two"
    assert after.pinned == {"globex"}
    known = after.keys[hash_of(key)]
    assert (known.label, known.models, known.admin) == ("service", frozenset({"acme"}), False)
    assert key not in (tmp_path / "registry.sqlite").read_bytes().decode("latin1")


def test_rolling_back_takes_the_version_before_and_no_further(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    first, second = added(registry, "acme", "one"), added(registry, "acme", "two")
    revision = registry.snapshot().revision
    assert registry.roll_back("acme") == first
    assert registry.snapshot().tenants["acme"] == first
    assert registry.snapshot().revision > revision
    with pytest.raises(RegistryError, match="no version before"):
        registry.roll_back("acme")
    third = added(registry, "acme", "three")
    assert third.number > second.number
    assert registry.roll_back("acme") == first
    assert [version.number for version in registry.versions("acme")] == [first.number]


def test_who_is_removed_takes_the_grants_along(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    added(registry, "acme")
    key = registry.add_key("service", models=["acme"])
    registry.remove("acme")
    assert registry.snapshot().tenants == {}
    assert registry.snapshot().keys[hash_of(key)].models == frozenset()
    added(registry, "acme")  # another tenant, of the same name
    assert registry.snapshot().keys[hash_of(key)].models == frozenset()
    for nobody in (registry.roll_back, registry.remove):
        with pytest.raises(MissingError, match="no model 'nobody'"):
            nobody("nobody")


@pytest.mark.parametrize("name", ["", "../acme", "a/b", ".hidden", "a" * 64, "a b", "ä"])
def test_a_name_that_is_none_changes_nothing(tmp_path: Path, name: str) -> None:
    registry = Registry(tmp_path)
    before = registry.snapshot()
    with pytest.raises(ConfigError, match="no name for a model"):
        added(registry, name)
    assert registry.snapshot() == before


def test_a_version_that_cannot_be_stored_is_none(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    before = registry.snapshot()
    with pytest.raises(StorageError, match="cannot write"):
        registry.add("acme", tmp_path / "missing", id="i", method="full", size=1)
    assert registry.snapshot() == before
    registry.close()
    (tmp_path / "bundles" / "17").mkdir()  # moved there by a process that was killed
    assert Registry(tmp_path).snapshot() == before
    assert not (tmp_path / "bundles" / "17").exists()


def test_a_key_has_a_label_of_its_own_and_can_be_removed(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    first = registry.add_key("service", admin=True)
    with pytest.raises(RegistryError, match="a key 'service' already"):
        registry.add_key("service")
    assert first != registry.add_key("another")
    registry.remove_key("service")
    assert [key.label for key in registry.snapshot().keys.values()] == ["another"]
    with pytest.raises(MissingError, match="no key 'service'"):
        registry.remove_key("service")
