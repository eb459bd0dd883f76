# SPDX-License-Identifier: Apache-2.0
"""Tenants, their versions and the keys: what must be as it was after a restart.

One process owns the database (SQLite, on a disk of its own machine). Everybody else asks it for a
:class:`Snapshot`, whose revision tells whether anything has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offsite_ray.bundle.manifest import now
from offsite_ray.config import check_model_name
from offsite_ray.errors import MissingError, RegistryError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_SCHEMA = """
create table if not exists revision (number integer not null);
create table if not exists tenants (
    name text primary key, current integer not null, pinned integer not null default 0
);
create table if not exists versions (
    number integer primary key autoincrement, tenant text not null, id text not null,
    method text not null, bytes integer not null, added text not null
);
create table if not exists keys (
    hash text primary key, label text not null unique, admin integer not null,
    per_minute integer, added text not null
);
create table if not exists seeds (tenant text not null, id text not null,
    primary key (tenant, id));
create table if not exists grants (hash text not null, tenant text not null,
    primary key (hash, tenant));
"""

_MAX_VERSIONS = 8
"""Of a tenant that are kept to roll back to."""
_KEY_BYTES = 32
"""Random bytes of a key: so many that a fast hash of it is as good as a slow one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A version of a tenant's adapter."""

    number: int
    """Of all versions of all tenants; never used twice."""
    tenant: str
    id: str
    """Of the adapter bundle, from its manifest."""
    method: str
    bytes: int
    path: str
    """The adapter bundle."""
    added: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """What the bearer of a key may do."""

    label: str
    admin: bool
    models: frozenset[str]
    """Tenants whose models it sees; an admin sees all."""
    per_minute: int | None
    """Requests that it may send in a minute; None: as many as it likes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What is served, as plain values."""

    revision: int
    """Changes whenever anything else here does."""
    tenants: Mapping[str, Version]
    pinned: frozenset[str]
    keys: Mapping[str, Key]
    """By the hash of the key."""


class Registry:
    """The database, and the directory of the adapter bundles; of one process."""

    def __init__(self, root: str | Path) -> None:
        """Open or make it.

        Args:
            root: Directory of a local disk.
        """
        self.root = Path(root)
        self.bundles = self.root / "bundles"
        self.bundles.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(self.root / "registry.sqlite", check_same_thread=False)
        self._db.execute("pragma journal_mode = wal")
        self._db.execute("pragma synchronous = full")
        with self._db:
            self._db.executescript(_SCHEMA)
            if not self._db.execute("select 1 from revision").fetchone():
                self._db.execute("insert into revision values (0)")
        self._sweep_bundles()

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def add(self, tenant: str, bundle: Path, *, id: str, method: str, size: int) -> Version:
        """Make a verified adapter bundle the current version of a tenant.

        Args:
            tenant: Its name; a new tenant where there is none of that name.
            bundle: Directory on the registry's disk, which is moved to where bundles are kept.
            id: Of the bundle.
            method: By which it was trained.
            size: Its bytes.

        Raises:
            ConfigError: The name is none.
            StorageError: The disk is full.
        """
        check_model_name(tenant)
        with self._changing():
            number = self._db.execute(
                "insert into versions (tenant, id, method, bytes, added) values (?, ?, ?, ?, ?)",
                (tenant, id, method, size, now()),
            ).lastrowid
            # A change that failed in its last moment leaves its number to the next one.
            shutil.rmtree(self.bundles / f"{number}", ignore_errors=True)
            bundle.rename(self.bundles / f"{number}")
            self._db.execute(
                "insert into tenants (name, current) values (?, ?) "
                "on conflict (name) do update set current = excluded.current",
                (tenant, number),
            )
            self._db.execute(
                "delete from versions where tenant = ? and number not in (select number from "
                "versions where tenant = ? order by number desc limit ?)",
                (tenant, tenant, _MAX_VERSIONS),
            )
        return self._version(int(number or 0))

    def was_seeded(self, tenant: str, id: str | None = None) -> bool:
        """Return whether an adapter bundle of the configuration has been taken in before.

        Args:
            tenant: Whose it is.
            id: Of the bundle; any, where none is given.
        """
        with self._lock:
            row = self._db.execute(
                "select 1 from seeds where tenant = ? and id = ifnull(?, id)", (tenant, id)
            ).fetchone()
        return row is not None

    def seeded(self, tenant: str, id: str) -> None:
        """Note that an adapter bundle of the configuration has been taken in."""
        with self._changing():
            self._db.execute("insert or ignore into seeds values (?, ?)", (tenant, id))

    def roll_back(self, tenant: str) -> Version:
        """Make the version before the current one the current one; the later one is forgotten.

        Raises:
            RegistryError: There is no tenant of that name, or no version before.
        """
        with self._changing():
            current = self._current(tenant)
            before = self._db.execute(
                "select max(number) from versions where tenant = ? and number < ?",
                (tenant, current),
            ).fetchone()[0]
            if before is None:
                raise RegistryError(f"{tenant} has no version before the current one")
            self._db.execute("delete from versions where number = ?", (current,))
            self._db.execute("update tenants set current = ? where name = ?", (before, tenant))
        return self._version(before)

    def remove(self, tenant: str) -> None:
        """Forget a tenant, its versions and who may use them; MissingError where there is none."""
        with self._changing():
            self._current(tenant)
            for table, column in (
                ("versions", "tenant"),
                ("tenants", "name"),
                ("grants", "tenant"),
            ):
                self._db.execute(f"delete from {table} where {column} = ?", (tenant,))

    def pin(self, tenant: str, *, pinned: bool) -> None:
        """Have a tenant stay in the model's memory, or no more."""
        with self._changing():
            self._current(tenant)
            self._db.execute("update tenants set pinned = ? where name = ?", (pinned, tenant))

    def versions(self, tenant: str) -> list[Version]:
        """Return the versions of a tenant, the newest first."""
        with self._lock:
            rows = self._db.execute(
                "select * from versions where tenant = ? order by number desc", (tenant,)
            ).fetchall()
        return [self._version_of(row) for row in rows]

    def add_key(
        self,
        label: str,
        *,
        models: Iterable[str] = (),
        admin: bool = False,
        per_minute: int | None = None,
        key: str | None = None,
    ) -> str:
        """Make a key and return it; it is not kept, and cannot be had again.

        Args:
            label: By which people know it.
            models: Tenants whose models it may use.
            admin: Whether it may change what is served, and use all.
            per_minute: Requests in a minute.
            key: Somebody's choice, instead of a new one by chance.

        Raises:
            RegistryError: There is one of that label.
        """
        key = key or "sk-" + secrets.token_urlsafe(_KEY_BYTES)
        with self._changing():
            if self._db.execute("select 1 from keys where label = ?", (label,)).fetchone():
                raise RegistryError(f"there is a key {label!r} already; remove it first")
            self._db.execute(
                "insert into keys values (?, ?, ?, ?, ?)",
                (hash_of(key), label, admin, per_minute, now()),
            )
            self._db.executemany(
                "insert or ignore into grants values (?, ?)",
                [(hash_of(key), model) for model in models],
            )
        return key

    def grant(self, label: str, models: Iterable[str]) -> None:
        """Have a key use these models and no others; MissingError where there is none."""
        with self._changing():
            row = self._db.execute("select hash from keys where label = ?", (label,)).fetchone()
            if row is None:
                raise MissingError(f"there is no key {label!r}")
            self._db.execute("delete from grants where hash = ?", row)
            self._db.executemany(
                "insert or ignore into grants values (?, ?)", [(*row, model) for model in models]
            )

    def remove_key(self, label: str) -> None:
        """Forget a key; MissingError where there is none of that label."""
        with self._changing():
            row = self._db.execute("select hash from keys where label = ?", (label,)).fetchone()
            if row is None:
                raise MissingError(f"there is no key {label!r}")
            self._db.execute("delete from keys where hash = ?", row)
            self._db.execute("delete from grants where hash = ?", row)

    def snapshot(self) -> Snapshot:
        """Return what is served now."""
        with self._lock:
            revision = self._db.execute("select number from revision").fetchone()[0]
            tenants = self._db.execute(
                "select versions.* from versions join tenants on number = current"
            ).fetchall()
            pinned = self._db.execute("select name from tenants where pinned").fetchall()
            keys = self._db.execute("select hash, label, admin, per_minute from keys").fetchall()
            grants = self._db.execute("select hash, tenant from grants").fetchall()
        models: dict[str, set[str]] = {}
        for digest, tenant in grants:
            models.setdefault(digest, set()).add(tenant)
        return Snapshot(
            revision=revision,
            tenants={row[1]: self._version_of(row) for row in tenants},
            pinned=frozenset(name for (name,) in pinned),
            keys={
                digest: Key(
                    label=label,
                    admin=bool(admin),
                    models=frozenset(models.get(digest, ())),
                    per_minute=per_minute,
                )
                for digest, label, admin, per_minute in keys
            },
        )

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Change everything that is changed below, or nothing; and the revision."""
        with self._lock:
            try:
                with self._db:
                    yield
                    self._db.execute("update revision set number = number + 1")
            except (sqlite3.Error, OSError) as error:
                raise StorageError(f"cannot write to {self.root}: {error}") from error
            self._sweep_bundles()

    def _current(self, tenant: str) -> int:
        row = self._db.execute("select current from tenants where name = ?", (tenant,)).fetchone()
        if row is None:
            raise MissingError(f"there is no model {tenant!r}")
        return int(row[0])

    def _version(self, number: int) -> Version:
        with self._lock:
            row = self._db.execute("select * from versions where number = ?", (number,)).fetchone()
        return self._version_of(row)

    def _version_of(self, row: tuple[int, str, str, str, int, str]) -> Version:
        number, tenant, id_, method, size, added = row
        return Version(
            number=number,
            tenant=tenant,
            id=id_,
            method=method,
            bytes=size,
            path=str(self.bundles / f"{number}"),
            added=added,
        )

    def _sweep_bundles(self) -> None:
        """Remove bundles of versions that are forgotten, or that never came to be one."""
        known = {f"{number}" for (number,) in self._db.execute("select number from versions")}
        for path in self.bundles.iterdir():
            if path.name not in known:
                shutil.rmtree(path, ignore_errors=True)


def hash_of(key: str) -> str:
    """Return by what a key is known; the key itself is nowhere kept."""
    return hashlib.sha256(key.encode()).hexdigest()
