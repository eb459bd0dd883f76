# SPDX-License-Identifier: Apache-2.0
"""Who may use what: every key with every model, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from offsite_ray.serving.access import (
    DeniedError,
    ForbiddenError,
    Gate,
    RateError,
    UnknownModelError,
)
from offsite_ray.serving.registry import Key, Snapshot, Version, hash_of

if TYPE_CHECKING:
    from collections.abc import Callable

BASE = "foundation"


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def a_version(number: int, tenant: str) -> Version:
    return Version(
        number=number, tenant=tenant, id="i", method="full", bytes=1, path="p", added="now"
    )


def a_key(*models: str, admin: bool = False, per_minute: int | None = None) -> Key:
    return Key(label="l", admin=admin, models=frozenset(models), per_minute=per_minute)


KEYS = {
    "of acme": a_key("acme"),
    "of both": a_key("acme", "globex"),
    "of the base": a_key(BASE),
    "of nothing": a_key(),
    "of what is gone": a_key("initech"),
    "of an admin": a_key(admin=True),
}
SEEN = {
    "of acme": ["acme"],
    "of both": ["acme", "globex"],
    "of the base": [BASE],
    "of nothing": [],
    "of what is gone": [],
    "of an admin": ["acme", BASE, "globex"],
}


def a_gate(base: str | None = BASE, clock: Callable[[], float] | None = None) -> Gate:
    keys = {hash_of(name): key for name, key in KEYS.items()}
    keys[hash_of("slow")] = a_key("acme", per_minute=3)
    tenants = {name: a_version(i, name) for i, name in enumerate(("acme", "globex"), 1)}
    snapshot = Snapshot(revision=1, tenants=tenants, pinned=frozenset(), keys=keys)
    return Gate(snapshot=snapshot, base=base, clock=clock or Clock())


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("model", ["acme", "globex", "initech", BASE, "", "../acme"])
def test_a_key_has_its_models_and_no_other_is_told_from_none(name: str, model: str) -> None:
    gate = a_gate()
    key = gate.bearer(name)
    assert gate.models(key) == SEEN[name]
    if model in SEEN[name]:
        version = gate.version(key, model)
        assert (version and version.tenant) == (None if model == BASE else model)
        return
    with pytest.raises(UnknownModelError) as caught:
        gate.version(key, model)
    assert str(caught.value) == f"there is no model {model!r}"


def test_the_full_model_is_nobodys_where_it_is_not_served() -> None:
    gate = a_gate(base=None)
    for key in KEYS.values():
        assert BASE not in gate.models(key)
        with pytest.raises(UnknownModelError):
            gate.version(key, BASE)


@pytest.mark.parametrize(
    "token", [None, "", "nobody", "Bearer of acme", " of acme", hash_of("of acme")]
)
def test_without_a_key_nothing_is_told(token: str | None) -> None:
    with pytest.raises(DeniedError, match="Authorization: Bearer KEY"):
        a_gate().bearer(token)


def test_only_an_admin_changes_what_is_served() -> None:
    gate = a_gate()
    gate.admin(KEYS["of an admin"])
    for name, key in KEYS.items():
        if not key.admin:
            with pytest.raises(ForbiddenError, match="admin"):
                gate.admin(KEYS[name])


def test_a_key_sends_so_many_requests_a_minute() -> None:
    clock = Clock()
    gate = a_gate(clock=clock)
    for _ in range(3):
        gate.bearer("slow")
    with pytest.raises(RateError) as caught:
        gate.bearer("slow")
    assert caught.value.retry_after_s == pytest.approx(20.0)
    gate.bearer("of acme")  # another key is its own
    clock.now += 20.0
    gate.bearer("slow")
    with pytest.raises(RateError):
        gate.bearer("slow")
    clock.now += 3600.0
    for _ in range(3):  # who has waited long has saved up a minute, and no more
        gate.bearer("slow")
    with pytest.raises(RateError):
        gate.bearer("slow")
