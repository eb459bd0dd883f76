# SPDX-License-Identifier: Apache-2.0
"""What is served, kept over restarts; nothing enters it unverified."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite_ray.adapter import open_adapter
from offsite_ray.bundle import alone, read_manifest, storage_errors, sync
from offsite_ray.emulator import open_full_model
from offsite_ray.errors import ConfigError, OffsiteError, RegistryError, StorageError
from offsite_ray.serving.registry import Registry, hash_of
from offsite_ray.serving.tenants import own_of
from offsite_ray.serving.uploads import Uploads
from offsite_ray.storage import fetched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from offsite_ray.config import ApplicationConfig
    from offsite_ray.serving.registry import Snapshot, Version

_LOG = logging.getLogger(__name__)

ADMIN = "admin"
"""Label of the administrator's key."""

_LET_GO_S = 60.0
_PART_BYTES = 32 << 20


class Store:
    """The registry, what is uploaded to it, and the full model that all of it must fit."""

    def __init__(self, config: ApplicationConfig) -> None:
        """Open it; adapter bundles of the configuration are taken in, each once.

        Args:
            config: Of the application.

        Raises:
            OffsiteError: The full model or an adapter bundle is none, or the state cannot be kept.
        """
        self._full = open_full_model(config.model)
        self._full_model_name = config.full_model_name
        root = Path(config.state)
        # Another process that ends just now, or a second one by mistake, has the same files.
        self._alone = contextlib.ExitStack()
        self._alone.enter_context(_only_one(root / ".lock"))
        with storage_errors(root):
            self.registry = Registry(root)
            self.uploads = Uploads(root / "uploads", int(config.max_upload_gib * 2**30))
        if self._full_model_name in self.registry.snapshot().tenants:
            raise ConfigError(
                f"full_model_name={self._full_model_name!r} is the name of a tenant; choose another"
            )
        self._verifying = threading.Lock()
        self._let_admin_in(config.admin_key_path())
        for name, path in config.adapters().items():
            self._seed(name, path)

    def snapshot(self, revision: int | None = None) -> Snapshot | None:
        """Return what is served, or None where it is still that of a revision."""
        found = self.registry.snapshot()
        return None if found.revision == revision else found

    def call(self, method: str, *given: Any, **named: Any) -> Any:
        """Do what one of the calls is called, of those that others may make."""
        calls: dict[str, Callable[..., Any]] = {
            "begin_upload": self.uploads.begin,
            "add_part": self.uploads.add,
            "finish_upload": self._finish,
            "forget_upload": self.uploads.forget,
            "versions": self.registry.versions,
            "roll_back": self.registry.roll_back,
            "remove": self.registry.remove,
            "pin": self.registry.pin,
            "add_key": self.registry.add_key,
            "grant": self.registry.grant,
            "remove_key": self._remove_key,
        }
        return calls[method](*given, **named)

    def _remove_key(self, label: str) -> None:
        if label == ADMIN:
            raise RegistryError(
                f"{label!r} is the key of the file; write another into it and start again"
            )
        self.registry.remove_key(label)

    def _finish(self, upload: str, name: str) -> Version:
        """Make an adapter bundle that was uploaded the current version of a model.

        Raises:
            OffsiteError: It is none, was altered, or does not fit; nothing has changed then.
        """
        with self.uploads.unpacked(upload) as directory:
            try:
                return self._take_in(name, directory)
            except OffsiteError as error:
                # Who sent it knows it by its name; where it lies here is nobody's business.
                raise type(error)(str(error).replace(str(directory), name)) from error

    def parts(self, number: int) -> Iterator[tuple[str, bytes]]:
        """Yield the files of a version's adapter bundle: name and the next bytes."""
        directory = self.registry.bundles / f"{number}"
        for path in sorted(directory.iterdir()):
            with path.open("rb") as file:
                while part := file.read(_PART_BYTES):
                    yield path.name, part

    def _take_in(self, name: str, directory: Path) -> Version:
        """Verify an adapter bundle on the registry's disk, and move it into the registry."""
        if name == self._full_model_name:
            raise RegistryError(f"{name!r} is the full model itself; choose another name")
        # One at a time: two large bundles in memory at once would be twice what one takes.
        with self._verifying:
            adapter = open_adapter(directory)
            own = own_of(adapter, self._full)
        current = self.registry.snapshot().tenants.get(name)
        if current is not None and current.id == adapter.manifest.id:
            return current  # once more the same is no new version, and pushes no old one out
        with storage_errors(directory):
            for path in (*directory.iterdir(), directory):
                sync(path)
        return self.registry.add(
            name, directory, id=adapter.manifest.id, method=adapter.method, size=own.nbytes
        )

    def _seed(self, name: str, given: str) -> None:
        try:
            path = fetched(given)
        except StorageError as error:
            if not self.registry.was_seeded(name):
                raise
            _LOG.warning("%s; %s is as it was taken in and left", error, name)
            return
        if not path.is_dir() and self.registry.was_seeded(name):
            _LOG.warning("%s is gone; %s is as it was taken in and left", path, name)
            return
        identity = read_manifest(path).id
        if self.registry.was_seeded(name, identity):
            current = self.registry.snapshot().tenants.get(name)
            if current is None or current.id != identity:
                _LOG.warning(
                    "%s was taken in as %s before, and is not again; upload it", path, name
                )
            return
        copy = self.uploads.root / f"seed-{name}"
        with storage_errors(path):
            shutil.copytree(path, copy)
        self._take_in(name, copy)
        shutil.rmtree(copy, ignore_errors=True)  # still there where it is what is served already
        self.registry.seeded(name, identity)

    def _let_admin_in(self, file: Path) -> None:
        """Have the key of a file be the administrator's; make one where there is no file."""
        known = {key.label: digest for digest, key in self.registry.snapshot().keys.items()}
        if file.exists():
            with storage_errors(file):
                key = file.read_text().strip()
            if not key:
                raise StorageError(f"{file} is empty; write the administrator's key to it")
            if known.get(ADMIN) == hash_of(key):
                return
            if ADMIN in known:
                self.registry.remove_key(ADMIN)
            self.registry.add_key(ADMIN, admin=True, key=key)
            return
        if ADMIN in known:
            self.registry.remove_key(ADMIN)
        key = self.registry.add_key(ADMIN, admin=True)
        with storage_errors(file):
            tmp = file.with_name(f".{file.name}.tmp")
            tmp.unlink(missing_ok=True)
            with open(os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as target:
                target.write(key + "\n")
            tmp.rename(file)
        _LOG.info("wrote the administrator's key to %s", file)


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Hold the state of an application; wait a while for who is about to let go of it."""
    until = time.monotonic() + _LET_GO_S
    while True:
        try:
            with alone(lock, busy=f"{lock.parent} is the state of an application that runs"):
                yield
            return
        except StorageError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
