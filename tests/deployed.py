# SPDX-License-Identifier: Apache-2.0
"""A running application: ``offsite-ray serve`` as a process, with tenants of a tiny model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import requests

from cluster.local import free_port
from tests.served import Tenants, make_tenants
from tests.texts import CHAT
from tests.tiny_models import save_tiny, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

START_S = 180.0
BASE = "whole"
"""Name of the full model as it is."""


@dataclass(kw_only=True)
class Deployed:
    """What a client of a running application knows."""

    url: str
    tenants: Tenants
    state: Path
    process: subprocess.Popen[str]
    log: Path
    metrics: str = ""
    logs_at: Path = Path()
    keys: dict[str, str] = field(default_factory=dict)
    """Label of a key to the key; "admin" is the administrator's."""

    def call(
        self, method: str, path: str, key: str | None = "admin", **given: Any
    ) -> requests.Response:
        """Send a request with one of the keys."""
        headers = dict(given.pop("headers", {}))
        if key is not None:
            headers["Authorization"] = f"Bearer {self.keys.get(key, key)}"
        return requests.request(
            method, self.url + path, headers=headers, timeout=given.pop("timeout", 60), **given
        )

    def upload(self, name: str, adapter: Path | bytes, key: str = "admin") -> requests.Response:
        """Send an adapter bundle, or some bytes in the place of its archive."""
        body = adapter if isinstance(adapter, bytes) else archive(adapter)
        return self.call("PUT", f"/admin/models/{name}", key, data=body)

    def add_key(self, label: str, *models: str, **given: Any) -> str:
        """Have a key made; it is known by its label from then on."""
        asked = {"label": label, "models": list(models), **given}
        answer = self.call("POST", "/admin/keys", json=asked)
        assert answer.status_code == 200, answer.text
        self.keys[label] = answer.json()["key"]
        return self.keys[label]

    def complete(self, model: str, prompt: Any = "Hello", key: str = "admin", **given: Any) -> Any:
        """Return the answer to a completion, greedy unless said otherwise."""
        asked = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 6, **given}
        answer = self.call("POST", "/v1/completions", key, json=asked)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def replicas(self, deployment: str = "Engines") -> list[psutil.Process]:
        """Return the processes of the replicas of a deployment."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if f"ServeReplica:offsite-ray:{deployment}" in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def logs(self) -> list[Path]:
        """Return the log files of Serve."""
        return [path for path in self.logs_at.rglob("*") if path.is_file()]

    def stop(self) -> int:
        """Tell it to end; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


def archive(adapter: Path) -> bytes:
    """Return an adapter bundle as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(adapter, arcname=".")
    return buffer.getvalue()


def make_served(root: Path, num_positions: int = 64) -> Tenants:
    """Write a tiny model with a chat template, and its tenants."""
    full = save_tiny(
        "gpt2", root / "full", tie_word_embeddings=False, max_position_embeddings=num_positions
    )
    tenants = make_tenants("gpt2", root, full=full)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    for directory in (tenants.full, *tenants.plugged_in.values()):
        tokenizer.save_pretrained(directory)
    return tenants


@contextlib.contextmanager
def deployed(tenants: Tenants, state: Path, **given: Any) -> Iterator[Deployed]:
    """Serve tenants until the block ends.

    Args:
        tenants: The full model and the adapter bundles.
        state: Directory of the application.
        **given: Flags of ``offsite-ray serve``, by field.
    """
    port, log = free_port(), state.with_suffix(".log")
    fields = {"min_replicas": 1, "num_cpus": 0.5, "max_queue": 8, "max_rows": 8, **given}
    words = [
        *(f"--adapter={name}={path}" for name, path in tenants.adapters.items()),
        *(f"--{name.replace('_', '-')}={value}" for name, value in fields.items()),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "offsite_ray", "serve", "--json", f"--model={tenants.full}",
             f"--state={state}", f"--port={port}", f"--full-model-name={BASE}", *words],
            stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
        )  # fmt: skip
    served = Deployed(url="", tenants=tenants, state=state, process=process, log=log)
    try:
        said = read_object(process)
        assert said is not None, log.read_text()
        served.url, served.metrics = said["url"], said["metrics"]
        served.logs_at = Path(said["logs"])
        served.keys["admin"] = Path(said["admin_key_file"]).read_text().strip()
        yield served
    finally:
        served.stop()
        assert process.stdout is not None
        process.stdout.close()


def read_object(process: subprocess.Popen[str]) -> dict[str, Any] | None:
    """Return the JSON object that a process prints; None where it ends without one."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        with contextlib.suppress(json.JSONDecodeError):
            found: dict[str, Any] = json.loads(text)
            return found
    return None


def eventually(true: Callable[[], bool], within: float = 20.0) -> None:
    """Wait until something is so."""
    until = time.monotonic() + within
    while not true():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.05)
