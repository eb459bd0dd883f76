# SPDX-License-Identifier: Apache-2.0
"""The application on Ray Serve: an ingress, replicas of the engine, and the store.

``offsite-ray serve`` and ``serve deploy`` build the same; a Serve config file names
``offsite_ray.serving.app:build`` and gives the fields of :class:`ApplicationConfig` as ``args``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.schema import LoggingConfig

from offsite_ray.config import ApplicationConfig
from offsite_ray.errors import BusyError, ConfigError, LostError, OffsiteError, unknown_name

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence

    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle

    from offsite_ray.serving.asks import Ask
    from offsite_ray.serving.registry import Snapshot
    from offsite_ray.serving.requests import Piece

_LOST = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    DeploymentUnavailableError,
)
_CHECKS = 3
"""Engines that are asked whether they work, before it is said that none does."""
_CHECK_S = 3.0
"""For all of them together."""
_MAX_CONNECTIONS = 4096
"""Requests that an ingress has open at a time."""


class Store:
    """The only process that has the database."""

    def __init__(self, config: ApplicationConfig) -> None:
        """Open it."""
        from offsite_ray.serving import store

        _ready_to_log()
        self._store = store.Store(config)

    async def snapshot(self, revision: int | None) -> Snapshot | None:
        """Return what is served, or None where it is still that of a revision."""
        return await asyncio.to_thread(self._store.snapshot, revision)

    async def call(self, method: str, given: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Return what a method of the store returns, or the error that it raises."""
        try:
            return await asyncio.to_thread(self._store.call, method, *given, **named)
        except OffsiteError as error:
            return error

    async def parts(self, number: int) -> AsyncIterator[tuple[str, bytes]]:
        """Yield the files of a version's adapter bundle: name and the next bytes."""
        parts = self._store.parts(number)
        while (part := await asyncio.to_thread(next, parts, None)) is not None:
            yield part


class Engines:
    """A replica of the engine: the full model once, and every tenant's own tensors."""

    async def __init__(  # type: ignore[misc]  # Serve waits for it, and takes no request before
        self, config: ApplicationConfig, store: DeploymentHandle[Any]
    ) -> None:
        """Load the full model and the tenants, and follow what the store says from then on."""
        import torch

        from offsite_ray.emulator import open_full_model
        from offsite_ray.serving.meters import Meters
        from offsite_ray.serving.replica import Replica
        from offsite_ray.serving.start import start_engine

        _ready_to_log()
        torch.set_num_threads(max(1, int(config.num_cpus)))
        full = open_full_model(config.model)
        engine = await asyncio.to_thread(
            start_engine,
            full,
            config,
            dtype=None if config.dtype == "auto" else getattr(torch, TORCH_NAMES[config.dtype]),
            device=_device(config),
            max_tenant_bytes=_bytes(config.max_tenant_gib),
        )
        self._replica = Replica(engine, full, Meters(), config.request_timeout)
        self._patience_s = config.step_timeout
        records = _Records(store)
        await self._replica.follow_once(records, records.parts)
        await self._replica.settle()
        self._following = asyncio.ensure_future(self._replica.follow(records, records.parts))

    async def complete(self, ask: Ask) -> Sequence[Piece] | OffsiteError:
        """Return the whole answer, or why there is none."""
        try:
            return await self._replica.complete(ask)
        except OffsiteError as error:
            return error

    async def stream(self, ask: Ask) -> AsyncIterator[Sequence[Piece] | OffsiteError]:
        """Yield the answer as it grows, or why there is none."""
        try:
            async with contextlib.aclosing(self._replica.stream(ask)) as stream:
                async for pieces in stream:
                    yield pieces
        except OffsiteError as error:
            yield error

    def check_health(self) -> None:
        """Raise where the engine no longer works; Serve replaces the replica then."""
        if not self._replica.engine.is_healthy(self._patience_s):
            raise RuntimeError("the engine's thread is stuck or dead, or every step fails")
        if self._following.done():
            raise RuntimeError("the replica follows the store no more")


class Ingress:
    """Speaks HTTP; knows who may do what."""

    def __init__(
        self,
        config: ApplicationConfig,
        engines: DeploymentHandle[Any],
        store: DeploymentHandle[Any],
    ) -> None:
        """Take the handles of the others."""
        _ready_to_log()
        self._config, self._engines, self._store = config, engines, store

    def __serve_build_asgi_app__(self) -> FastAPI:  # the name is Serve's
        """Return the application that Serve runs behind its proxy."""
        from offsite_ray.architectures import load_tokenizer
        from offsite_ray.emulator import open_full_model
        from offsite_ray.serving.api import create_api
        from offsite_ray.serving.front import Front
        from offsite_ray.serving.meters import counter
        from offsite_ray.serving.refusing import Refusing
        from offsite_ray.serving.start import max_positions

        full = open_full_model(self._config.model)
        requests = counter("requests")
        front = Front(
            self._config,
            Refusing(
                _Engines(self._engines),
                lambda model: requests.inc(1, {"model": model, "outcome": "refused"}),
            ),
            _Records(self._store),
            load_tokenizer(full.path),
            max_positions(full.config),
        )
        return create_api(front)


class _Records:
    """The store, behind its handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def snapshot(self, revision: int | None) -> Snapshot | None:
        with _told():
            found: Snapshot | None = await self._handle.snapshot.remote(revision)
        return found

    async def call(self, method: str, *given: Any, **named: Any) -> Any:
        with _told():
            return _opened(await self._handle.call.remote(method, given, named))

    async def parts(self, number: int) -> AsyncIterator[tuple[str, bytes]]:
        with _told():
            parts: Any = self._handle.options(stream=True).parts.remote(number)
            async for part in parts:
                yield part


class _Engines:
    """The replicas, behind their handle; what nobody waits for any more is ended there too."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def complete(self, ask: Ask) -> Sequence[Piece]:
        with _told():
            found: Sequence[Piece] = _opened(await _ended(self._handle.complete.remote(ask)))
            return found

    async def check(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CHECK_S):
                for _ in range(_CHECKS):
                    with contextlib.suppress(*_LOST, RayTaskError):  # another may work
                        await _ended(self._handle.check_health.remote())
                        return
        raise LostError("no engine answers; Serve replaces those that are lost, so ask again")

    async def stream(self, ask: Ask) -> AsyncGenerator[Sequence[Piece]]:
        with _told():
            response: Any = self._handle.options(stream=True).stream.remote(ask)
            try:
                async for found in response:
                    yield _opened(found)
            except (asyncio.CancelledError, GeneratorExit):
                response.cancel()
                raise


async def _ended(response: Any) -> Any:
    """Return what a replica answers; what nobody waits for any more is ended there too."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn what Ray says of lost replicas into our errors."""
    try:
        yield
    except BackPressureError as error:
        raise BusyError("all replicas are busy; ask again in a moment") from error
    except _LOST as error:
        raise LostError("the replica that answered was lost; ask again") from error


def _opened(found: Any) -> Any:
    """Return a value, or raise the error that came in its place."""
    if isinstance(found, OffsiteError):
        raise found
    return found


TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Of dtypes, as torch calls them and vLLM too."""


def _device(config: ApplicationConfig) -> str:
    if config.device != "auto":
        return config.device
    return "cuda" if config.num_gpus else "cpu"


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * 2**30)


def _ready_to_log() -> None:
    """Have what this package logs be where Serve's own logs are."""
    import logging

    ours, theirs = logging.getLogger("offsite_ray"), logging.getLogger("ray.serve")
    ours.handlers, ours.propagate = theirs.handlers, False
    ours.setLevel(theirs.level)


_LOGGING = LoggingConfig(encoding="JSON", enable_access_log=False)
_COMMON: dict[str, Any] = {
    "logging_config": _LOGGING,
    "health_check_period_s": 5,
    "health_check_timeout_s": 30,
}


def build(args: Mapping[str, Any]) -> serve.Application:
    """Return the application, of the ``args`` of a Serve config file.

    Raises:
        ConfigError: A field is unknown, or a value cannot be.
    """
    return application(config_of(args))


def config_of(args: Mapping[str, Any]) -> ApplicationConfig:
    """Return a configuration out of plain values; raise :class:`ConfigError` for what is none."""
    known = {field.name for field in dataclasses.fields(ApplicationConfig)}
    for name in args:
        if name not in known:
            raise ConfigError(unknown_name("key", name, known))
    try:
        return TypeAdapter(ApplicationConfig).validate_python(dict(args))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where}: {first['msg']}") from None


def application(config: ApplicationConfig) -> serve.Application:
    """Return the application.

    The store is on the head node, on whose disk it keeps what must survive.
    """
    store = serve.deployment(
        **_COMMON,
        num_replicas=1,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
    )(Store).bind(config)
    engines = serve.deployment(
        **_COMMON,
        **replica_options(config),
        # The engine itself refuses what it has no place for, at once; Serve would let it wait.
        max_ongoing_requests=_MAX_CONNECTIONS,
        graceful_shutdown_timeout_s=config.drain_timeout,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
    )(Engines).bind(config, store)
    ingress = serve.deployment(
        **_COMMON,
        num_replicas=config.num_ingress,
        max_ongoing_requests=_MAX_CONNECTIONS,
        graceful_shutdown_timeout_s=config.drain_timeout,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(Ingress))
    return ingress.bind(config, engines, store)


def replica_options(config: ApplicationConfig) -> dict[str, Any]:
    """Return how many replicas there are, in the words of Serve's deployments."""
    if config.min_replicas == config.max_replicas:
        return {"num_replicas": config.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_requests,
        }
    }
