# SPDX-License-Identifier: Apache-2.0
"""Serve config files, run and deployed by Serve's own commands."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
import yaml

from cluster.local import BIN, LONG_S, ROOT, Head, answers, environment, free_port, running_head
from tests.deployed import eventually, make_served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.served import Tenants


def config_file(
    file: Path, tenants: Tenants, port: int, args: dict[str, Any], **options: Any
) -> Path:
    """Write the Serve config file for one machine, with the tenant "acme".

    Args:
        file: To write.
        tenants: The full model, and adapter bundles of which one is served.
        port: Of HTTP.
        args: Fields of the application over those of the file.
        **options: Of Serve, for the engines.
    """
    plain: dict[str, Any] = yaml.safe_load((ROOT / "serve" / "local.yaml").read_text())
    plain["http_options"]["port"] = port
    (application,) = plain["applications"]
    application["args"] |= {
        "model": str(tenants.full),
        "adapter": [f"acme={tenants.adapters['full']}"],
        "num_cpus": 0.5,
        **args,
    }
    if options:
        application["deployments"] = [{"name": "Engines", **options}]
    file.write_text(yaml.safe_dump(plain))
    return file


@dataclass(kw_only=True)
class Client:
    """Somebody who asks the same again and again, as a whole and as a stream."""

    url: str
    key: str
    said: list[str] = field(default_factory=list)

    def ask(self, *, stream: bool = False, max_tokens: int = 40) -> requests.Response:
        wish = {"model": "acme", "prompt": "The cat sat", "temperature": 0, "stream": stream}
        return requests.post(
            f"{self.url}/v1/completions",
            json={**wish, "max_tokens": max_tokens},
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=LONG_S,
        )

    def hear(self, num: int) -> None:
        """Wait for some more answers."""
        before = len(self.said)
        eventually(lambda: len(self.said) >= before + num, LONG_S)

    @contextlib.contextmanager
    def asking(self, num_threads: int) -> Iterator[None]:
        """Ask all the time until the block ends; collect the texts, or what came instead."""
        enough = threading.Event()

        def ask() -> None:
            while not enough.is_set():
                self.said.append(text_of(self.ask()))
                self.said.append(text_of(self.ask(stream=True)))

        with ThreadPoolExecutor(num_threads) as pool:
            threads = [pool.submit(ask) for _ in range(num_threads)]
            try:
                yield
            finally:
                enough.set()
        for thread in threads:
            thread.result()


def text_of(answer: requests.Response) -> str:
    """Return the text of an answer that is complete, or else all that came."""
    if not answer.ok:
        return answer.text
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return str(answer.json()["choices"][0]["text"])
    *events, last = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    if last != "[DONE]":
        return answer.text
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_a_config_file_is_run_by_serve_itself(tmp_path: Path) -> None:
    tenants, port, state = make_served(tmp_path / "served"), free_port(), tmp_path / "state"
    file = config_file(tmp_path / "run.yaml", tenants, port, {"state": str(state)})
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [BIN / "serve", "run", "--address=local", file],
            env=environment(), stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: answers(f"{url}/health"), LONG_S)
        answer = Client(url=url, key=(state / "admin.key").read_text().strip()).ask()
        assert answer.status_code == 200, answer.text
        assert text_of(answer)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@dataclass(frozen=True, kw_only=True)
class Cluster(Head):
    """A head that serves."""

    port: int
    """Of Serve's HTTP."""

    def deploy(self, file: Path) -> Client:
        """Deploy a config file; return a client once somebody answers, old or new."""
        (application,) = yaml.safe_load(file.read_text())["applications"]
        command: list[str | Path] = [BIN / "serve", "deploy", f"--address={self.dashboard}", file]
        subprocess.run(command, env=self.environment, check=True)
        url = f"http://127.0.0.1:{self.port}"
        eventually(lambda: answers(f"{url}/health"), LONG_S)
        key = Path(application["args"]["state"]) / "admin.key"
        eventually(key.exists, LONG_S)
        return Client(url=url, key=key.read_text().strip())

    def is_settled(self, num_engines: int) -> bool:
        """Return whether all is as it was deployed, with some replicas of the engine."""
        found = requests.get(
            f"{self.dashboard}/api/serve/applications/", headers=self.headers, timeout=30
        ).json()["applications"]["offsite-ray"]
        states = [one["state"] for one in found["deployments"]["Engines"]["replicas"]]
        return found["status"] == "RUNNING" and states == ["RUNNING"] * num_engines


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_head("--num-cpus=4") as head:
        yield Cluster(**vars(head), port=free_port())


def test_a_rolling_update_loses_no_request(cluster: Cluster, tmp_path: Path) -> None:
    tenants, file = make_served(tmp_path / "served"), tmp_path / "deploy.yaml"
    args = {"state": str(tmp_path / "state"), "max_queue": 16, "max_output": 48}
    client = cluster.deploy(config_file(file, tenants, cluster.port, args))
    eventually(lambda: cluster.is_settled(1), LONG_S)
    expected = text_of(client.ask())
    assert client.ask(max_tokens=45).status_code == 200
    with client.asking(4):
        client.hear(8)
        cluster.deploy(config_file(file, tenants, cluster.port, {**args, "max_output": 40}))
        eventually(lambda: client.ask(max_tokens=45).status_code == 400, LONG_S)
        client.hear(8)
    assert set(client.said) == {expected}


@pytest.mark.long
def test_replicas_come_with_the_load_and_go_with_it(cluster: Cluster, tmp_path: Path) -> None:
    tenants, file = make_served(tmp_path / "served"), tmp_path / "deploy.yaml"
    args = {"state": str(tmp_path / "state"), "max_queue": 16, "max_replicas": 2}
    scaling = {
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2,
        "upscale_delay_s": 1, "downscale_delay_s": 1, "look_back_period_s": 2,
    }  # fmt: skip
    client = cluster.deploy(
        config_file(file, tenants, cluster.port, args, autoscaling_config=scaling)
    )
    eventually(lambda: cluster.is_settled(1), LONG_S)
    expected = text_of(client.ask())
    with client.asking(6):
        eventually(lambda: cluster.is_settled(2), LONG_S)
        client.hear(12)
    eventually(lambda: cluster.is_settled(1), LONG_S)
    assert set(client.said) == {expected}
    assert text_of(client.ask()) == expected
