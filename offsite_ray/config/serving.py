# SPDX-License-Identifier: Apache-2.0
"""Configuration of the application that serves plugged-in models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offsite_ray.config.ranges import check_least, check_positive
from offsite_ray.errors import ConfigError
from offsite_ray.uris import is_uri, shown

MODEL_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}")
"""What a model may be called: it is the model id of clients, and part of an address."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What an engine takes on at once."""

    max_rows: int = 16
    """Texts that a replica writes at a time."""
    cache_tokens: int = 16384
    """Tokens whose keys and values a replica holds: texts times the longest of them."""
    max_queue: int = 2
    """Requests that may wait at a replica; more are answered with 429. The longer it is, the longer
    the last one waits, and the more of a burst is taken in. A tenant that was refused may wait
    again after five seconds without a refusal."""
    max_prompt: int = 4096
    """Tokens of a prompt."""
    max_output: int = 2048
    """Tokens of an answer."""
    prefill_tokens: int = 512
    """Prompt tokens that are computed between two decoding steps."""

    def __post_init__(self) -> None:
        """Check ranges; raise :class:`ConfigError`."""
        check_least(self, 1, *Limits.__slots__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ApplicationConfig(Limits):
    """What the application serves and what it takes on; the ``args`` of a Serve config file."""

    model: str
    """Directory of the full model; every node with a replica must see it."""
    adapter: tuple[str, ...] = ()
    """NAME=ADAPTER: adapter bundle that is served as the model NAME from the start; one that was
    taken in once is not taken in again."""
    state: str = "serve-state"
    """Directory on a local disk for the tenants, their adapter bundles and the keys."""
    admin_key_file: str | None = None
    """File with the key of the administrator; by default admin.key in the state directory, which
    is made at the first start."""
    full_model_name: str | None = None
    """Name under which the full model itself is served; by default it is not."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the weights in memory; auto takes them as they are stored."""
    device: str = "auto"
    """Where replicas compute: cpu, cuda, or auto: a GPU where the replica has one."""
    num_cpus: float = 1.0
    """CPUs of a replica, and so its threads."""
    num_gpus: float = 0.0
    """GPUs of a replica."""
    min_replicas: int = 1
    """Replicas of the full model that are always there."""
    max_replicas: int = 1
    """Replicas that there may be under load."""
    target_requests: int = 16
    """Requests for each replica that autoscaling aims at."""
    num_ingress: int = 1
    """Replicas of what speaks HTTP; each counts the rate limits by itself."""
    max_tenant_gib: float | None = None
    """Of tenants' tensors on the device of a replica; the least recently used ones beyond it wait
    in host memory. By default all may stay."""
    max_upload_gib: float = 8.0
    """Of an adapter bundle that is uploaded."""
    request_timeout: float = 300.0
    """Seconds after which a request is given up."""
    drain_timeout: float = 300.0
    """Seconds that a replica which is to end has for the requests it has begun."""
    step_timeout: float = 60.0
    """Seconds that one step of the engine may take before the replica counts as stuck."""
    log_prompts: bool = False
    """Write prompts and answers to the logs."""

    def __post_init__(self) -> None:
        """Check ranges; raise :class:`ConfigError`."""
        Limits.__post_init__(self)
        check_least(self, 1, "min_replicas", "target_requests", "num_ingress")
        check_least(self, self.min_replicas, "max_replicas")
        check_positive(self, "max_tenant_gib", "max_upload_gib", "num_cpus")
        check_positive(self, "request_timeout", "step_timeout")
        check_least(self, 0, "num_gpus", "drain_timeout")
        self.adapters()
        if self.full_model_name is not None:
            check_model_name(self.full_model_name)
            if self.full_model_name in self.adapters():
                raise ConfigError(
                    f"{self.full_model_name!r} is both the full model and an adapter; rename one"
                )

    def admin_key_path(self) -> Path:
        """Return where the administrator's key is written."""
        return Path(self.admin_key_file or Path(self.state) / "admin.key")

    def adapters(self) -> dict[str, str]:
        """Return the adapter bundles of the start by name of their model.

        Raises:
            ConfigError: One has no name, or two have the same.
        """
        found: dict[str, str] = {}
        for given in self.adapter:
            name, equals, path = given.partition("=")
            if not equals or not path or is_uri(given):
                raise ConfigError(
                    f"adapter {shown(given)!r} must be NAME=ADAPTER, a name and a directory"
                )
            check_model_name(name)
            if name in found:
                raise ConfigError(f"two adapters are called {name!r}; rename one")
            found[name] = path
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig(ApplicationConfig):
    """Serve plugged-in models to OpenAI clients, many tenants on one full model."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for other machines too."""
    port: int = 8000
    """Port to listen on."""
    engine: Literal["shared", "vllm"] = "shared"
    """shared: many tenants on one full model; vllm: one plugged-in model, by ray.serve.llm."""

    def __post_init__(self) -> None:
        """Check ranges; raise :class:`ConfigError`."""
        ApplicationConfig.__post_init__(self)
        if not 0 < self.port < 2**16:
            raise ConfigError(f"port={self.port} must be from 1 to 65535")
        if self.engine == "vllm" and self.adapter:
            raise ConfigError(
                "engine=vllm serves one plugged-in model: run plug-in first, and give its "
                "directory as --model, without --adapter"
            )


def check_model_name(name: str) -> None:
    """Refuse what no model may be called; raise :class:`ConfigError`."""
    if not MODEL_NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for a model: letters, digits, '.', '_' and '-', up to 63, the "
            "first a letter or digit"
        )
