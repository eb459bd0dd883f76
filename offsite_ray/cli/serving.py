# SPDX-License-Identifier: Apache-2.0
"""Serving from the command line: start, say where, and go on until told to end."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from offsite_ray.cli.output import Outcome
from offsite_ray.cluster import serving_ray
from offsite_ray.errors import ClusterError, ConfigError, first_line
from offsite_ray.uris import shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offsite_ray.config import ServeConfig

_NAME = "offsite-ray"
_READY_S = 600.0
"""Seconds that the application may take to answer for the first time."""
_MARGIN_S = 30.0
"""Beyond the time that replicas have, for Serve to note that they have ended."""


def serve(config: ServeConfig, notice: Callable[[str], None]) -> Outcome:
    """Start the application; the outcome goes on until SIGINT or SIGTERM.

    Args:
        config: The application and where it listens.
        notice: Told what is going on.

    Raises:
        ConfigError: Something else listens there, or the model or an adapter cannot be served.
        ClusterError: The application did not start.
    """
    _check_port(config.host, config.port)
    application = _application(config)
    stack = contextlib.ExitStack()
    try:
        replicas = (config.min_replicas, config.max_replicas)
        num_gpus = max(1.0, config.num_gpus) if config.engine == "vllm" else config.num_gpus
        logs = stack.enter_context(serving_ray(replicas, config.num_cpus, num_gpus))
        notice(f"starting {shown(config.model)} on Ray Serve")
        stack.callback(_shut_down, config, notice)
        url = _run(application, config)
    except BaseException:
        stack.close()
        raise
    key_file = config.admin_key_path()
    plain: dict[str, Any] = {
        "url": url,
        "models": _models(url, key_file),
        "playground": f"{url}/",
        "api": f"{url}/docs",
        "metrics": _metrics(),
        "logs": None if logs is None else f"{logs}/serve",
        "admin_key_file": str(key_file),
        "state": config.state,
    }
    return Outcome(plain=plain, then=lambda: _until_told(stack))


def _application(config: ServeConfig) -> Any:
    """Return the application of the engine that was asked for."""
    if config.engine == "vllm":
        from offsite_ray.serving.vllm import vllm_application

        return vllm_application(config)
    from offsite_ray.serving.app import application
    from offsite_ray.serving.check import check_servable

    # Here, for a line that says what is wrong; where the replicas are it would be in a log.
    check_servable(config)
    return application(config)


def _check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on; raise :class:`ConfigError`."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
            ) from error


def _run(application: Any, config: ServeConfig) -> str:
    """Start Serve and the application, and wait until it answers; return its address."""
    from ray import serve as ray_serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray_serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.host, "port": config.port},
            logging_config={"encoding": "JSON", "enable_access_log": False},
        )
        ray_serve.run(application, name=_NAME, route_prefix="/")
    except Exception as error:
        raise ClusterError(f"the application did not start: {first_line(error)}") from error
    host = "127.0.0.1" if config.host == "0.0.0.0" else config.host
    url = f"http://{host}:{config.port}"
    _wait_until_ready(f"{url}/health" if config.engine == "shared" else f"{url}/v1/models")
    return url


def _models(url: str, key_file: Path) -> list[str] | None:
    """Return the models that are served, also since before; None where no key is at hand to ask."""
    key = key_file.read_text().strip() if key_file.is_file() else ""
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return sorted(model["id"] for model in json.load(answer)["data"])
    except OSError:  # of which HTTP's errors are
        return None


def _metrics() -> str:
    """Return where Prometheus finds what this node measures."""
    import ray

    node = next(node for node in ray.nodes() if node["Alive"])
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def _wait_until_ready(address: str) -> None:
    until = time.monotonic() + _READY_S
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(address, timeout=10):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise ClusterError(f"{address} does not answer after {_READY_S:.0f} s; Serve's logs say why")


def _until_told(stack: contextlib.ExitStack) -> None:
    """Wait for SIGINT or SIGTERM, then let what is in flight end, and end."""
    told = threading.Event()
    with stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: told.set())
        while not told.wait(1.0):
            pass
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends at once


def _shut_down(config: ServeConfig, notice: Callable[[str], None]) -> None:
    """End the application after what is in flight; on a cluster of others, nothing else there."""
    from ray import serve as ray_serve

    notice("letting what is in flight end; Ctrl-C ends at once")
    if _NAME in ray_serve.status().applications:
        ray_serve.delete(_NAME, _blocking=False)
    until = time.monotonic() + config.drain_timeout + _MARGIN_S
    while _NAME in ray_serve.status().applications and time.monotonic() < until:
        time.sleep(0.5)
    if not os.environ.get("RAY_ADDRESS"):
        ray_serve.shutdown()
