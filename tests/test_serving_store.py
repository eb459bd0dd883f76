# SPDX-License-Identifier: Apache-2.0
"""What the store takes in, and what it makes of its configuration when it starts again."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from offsite_ray.config import ApplicationConfig
from offsite_ray.emulator import open_full_model
from offsite_ray.errors import ConfigError, FamilyError
from offsite_ray.serving.check import check_servable
from offsite_ray.serving.store import Store
from offsite_ray.serving.tenants import read_own
from tests.served import Tenants, make_tenants

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return make_tenants("gpt2", tmp_path_factory.mktemp("tenants"), ["lora"])


def config(tenants: Tenants, root: Path) -> ApplicationConfig:
    return ApplicationConfig(
        model=str(tenants.full), adapter=(f"acme={root / 'adapter'}",), state=str(root / "state")
    )


@pytest.fixture
def taken_in(tenants: Tenants, tmp_path: Path) -> Path:
    """A folder with an adapter bundle, and the state of a store that has taken it in."""
    shutil.copytree(tenants.adapters["lora"], tmp_path / "adapter")
    store = Store(config(tenants, tmp_path))
    assert list(store.registry.snapshot().tenants) == ["acme"]
    close(store)
    return tmp_path


def close(store: Store) -> None:
    store.registry.close()
    store._alone.close()


def test_a_bundle_that_was_taken_in_may_go(tenants: Tenants, taken_in: Path) -> None:
    shutil.rmtree(taken_in / "adapter")
    given = config(tenants, taken_in)
    check_servable(given)
    store = Store(given)
    assert list(store.registry.snapshot().tenants) == ["acme"]
    store.registry.remove("acme")
    close(store)
    store = Store(given)
    assert not store.registry.snapshot().tenants
    close(store)


def test_the_full_model_has_no_tenants_name(tenants: Tenants, taken_in: Path) -> None:
    other = ApplicationConfig(
        model=str(tenants.full), state=str(taken_in / "state"), full_model_name="acme"
    )
    with pytest.raises(ConfigError, match="full_model_name='acme' is the name of a tenant"):
        Store(other)


def test_an_adapter_that_cannot_be_routed_is_refused_before_it_is_served(tmp_path: Path) -> None:
    tenants = make_tenants("mixtral", tmp_path, ["full"])
    full = open_full_model(tenants.full)
    with pytest.raises(FamilyError, match="cannot be computed row by row"):
        read_own(tenants.adapters["full"], full)
