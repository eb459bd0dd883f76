# SPDX-License-Identifier: Apache-2.0
"""Drills while clients ask a served model, whole answers and streams, at the proxy of every worker.

Durable is what the store has told of: tenants and keys. Lost is also an answer that is wrong, or
half an answer that does not say so. What clients get instead of an answer is counted by its kind;
they ask the workers that are up, as behind a load balancer that hears of a lost node at once, and
do not try again.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests
import yaml

from cluster.drills.lab import Lab, Outcome, wait_until
from cluster.local import BIN, LONG_S, ROOT, answers, free_port
from tests.deployed import make_served

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ENGINES = 2
_CLIENTS = 4
_STEADY_S = 5.0
"""Of undisturbed load, before a fault and after all is whole."""
_CUT_S = 20.0
_PATIENCE_S = 60.0
"""Of a client, for an answer."""


_SILENT = "a stream that was cut, and did not say so"


class LostStream(Exception):
    """A stream ended before its end."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What came of a request."""

    at: float
    """When it was sent."""
    seconds: float
    node: int
    """Whose proxy was asked."""
    stream: bool
    kind: str
    """``"answer"``, or what came instead of it."""


@dataclass(kw_only=True)
class Service:
    """A served model with a tenant, and clients of it."""

    lab: Lab
    port: int
    key: str
    expected: str = ""
    asked: list[Asked] = field(default_factory=list)

    def url(self, number: int) -> str:
        """Return where the proxy of a worker is."""
        return f"http://{self.lab.address(number)}:{self.port}"

    def ask(self, number: int, *, stream: bool) -> str:
        """Return the text of an answer; raise for anything else."""
        wish = {"model": "acme", "prompt": "The cat sat", "temperature": 0, "max_tokens": 24}
        answer = requests.post(
            f"{self.url(number)}/v1/completions",
            json={**wish, "stream": stream},
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=_PATIENCE_S,
        )
        answer.raise_for_status()
        return _text(answer, stream=stream)

    def note(self, number: int, *, stream: bool) -> None:
        """Ask, and note what came of it."""
        began = time.monotonic()
        try:
            text = self.ask(number, stream=stream)
            kind = "answer" if text == self.expected else f"wrong: {text[:80]}"
        except requests.HTTPError as error:
            kind = f"status {error.response.status_code}"
        except requests.Timeout:
            kind = "no answer in time"
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            kind = "no connection, or a lost one"
        except LostStream as error:
            kind = str(error)
        self.asked.append(
            Asked(at=began, seconds=time.monotonic() - began, node=number, stream=stream, kind=kind)
        )

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        """Have clients ask all the time, each time at some worker, until the block ends."""
        enough = threading.Event()

        def client(seed: int) -> None:
            draw = random.Random(seed)
            while not enough.is_set():
                numbers = sorted(self.lab.workers)
                self.note(draw.choice(numbers), stream=draw.random() < 0.5)
                enough.wait(0.05)

        with ThreadPoolExecutor(_CLIENTS) as pool:
            clients = [pool.submit(client, seed) for seed in range(_CLIENTS)]
            try:
                time.sleep(_STEADY_S)
                yield
                time.sleep(_STEADY_S)
            finally:
                enough.set()
            for one in clients:
                one.result()

    def whole(self) -> bool:
        """Return whether Serve has all engines at work, and every worker's proxy answers."""
        url = f"{self.lab.head.dashboard}/api/serve/applications/"
        try:
            found = requests.get(url, headers=self.lab.head.headers, timeout=10).json()
            states = {
                name: [replica["state"] for replica in deployment["replicas"]]
                for name, deployment in found["applications"]["offsite-ray"]["deployments"].items()
            }
        except (requests.RequestException, KeyError):
            return False
        return (
            states.get("Engines") == ["RUNNING"] * _ENGINES
            and all(state == ["RUNNING"] for name, state in states.items() if name != "Engines")
            and any(self.answering())
        )

    def answering(self) -> list[int]:
        """Return the workers at whose proxy the service is healthy."""
        return [n for n in self.lab.workers if answers(f"{self.url(n)}/health")]

    def tenants(self) -> Any:
        """Return what the store knows of tenants; raise where it does not answer."""
        number = self.answering()[0]
        answer = requests.get(
            f"{self.url(number)}/admin/models",
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=_PATIENCE_S,
        )
        answer.raise_for_status()
        return answer.json()


def _text(answer: requests.Response, *, stream: bool) -> str:
    if not stream:
        return str(answer.json()["choices"][0]["text"])
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    if not events or events[-1] != "[DONE]":
        told = bool(events) and "error" in json.loads(events[-1])
        raise LostStream("a stream that was cut, and said so" if told else _SILENT)
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


@contextlib.contextmanager
def _served(lab: Lab, ingress_cpus: float = 0) -> Iterator[Service]:
    """Serve a tiny model with a tenant on two workers, until the block ends.

    Args:
        lab: Where.
        ingress_cpus: That the ingress takes; with some of them it is on no head, which has none.
    """
    folder = lab.folder / "served"
    if not folder.exists():
        make_served(folder)
    state = Path(lab.head.scratch) / "state"
    port = free_port()
    plain = yaml.safe_load((ROOT / "serve" / "local.yaml").read_text())
    plain |= {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": port},
    }
    (application,) = plain["applications"]
    application["args"] |= {
        "model": str(folder / "full"), "adapter": [f"acme={folder / 'adapter-full'}"],
        "state": str(state), "num_cpus": 1, "max_queue": 32,
        "min_replicas": _ENGINES, "max_replicas": _ENGINES,
    }  # fmt: skip
    actor = {"num_cpus": ingress_cpus}
    application["deployments"] = [{"name": "Ingress", "ray_actor_options": actor}]
    file = lab.folder / "serve.yaml"
    file.write_text(yaml.safe_dump(plain))
    subprocess.run(
        [BIN / "serve", "deploy", f"--address={lab.head.dashboard}", file],
        env=lab.head.environment, check=True, capture_output=True, timeout=LONG_S,
    )  # fmt: skip
    key = state / "admin.key"
    service = Service(lab=lab, port=port, key="")
    wait_until(service.whole, "the service is up")
    service.key = key.read_text().strip()
    service.expected = service.ask(service.answering()[0], stream=False)
    yield service


def _outcome(
    service: Service, fault: float, whole: float, hit: Sequence[int], before: Any, **more: Any
) -> Outcome:
    """Return what clients saw, and whether the store has what it had.

    Args:
        service: That was asked.
        fault: When it began.
        whole: Seconds until all was as before.
        hit: Workers whose proxy was lost or cut off.
        before: Tenants before the fault.
        **more: Numbers.
    """
    after = [one for one in service.asked if one.at + one.seconds >= fault]
    kinds = {
        where: dict(Counter(one.kind for one in after if (one.node in hit) == there))
        for where, there in (("at the nodes that were hit", True), ("at the others", False))
    }
    failed = [one for one in after if one.kind != "answer"]
    others = [one for one in failed if one.node not in hit]
    lost = [one.kind for one in failed if one.kind.startswith(("wrong", _SILENT))]
    if service.tenants() != before:
        lost.append("the tenants are others than before")
    answered = [one for one in after if one.kind == "answer"]
    return Outcome(
        lost=lost,
        cost=f"{len(failed)} of {len(after)} requests, {len(others)} of them at nodes not hit",
        whole_after_s=whole,
        numbers={
            "requests": len(after),
            "kinds": kinds,
            "last_failed_after_s": max((o.at + o.seconds - fault for o in failed), default=None),
            "slowest_answer_s": max((o.seconds for o in answered), default=None),
            **more,
        },
    )


def worker_killed(lab: Lab) -> Outcome:
    """Kill -9 every process of a node with an engine, under load."""
    with _served(lab) as service, service.load():
        before = service.tenants()
        number = lab.nodes_with("ServeReplica:offsite-ray:Engines")[-1]
        lab.workers.pop(number).kill()
        fault = time.monotonic()
        whole = wait_until(service.whole, "the service is whole again")
    return _outcome(service, fault, whole, [number], before)


def cut_off(lab: Lab) -> Outcome:
    """Pull the cable of a node with an engine for 20 seconds, under load."""
    assert lab.network is not None
    with _served(lab) as service, service.load():
        before = service.tenants()
        number = lab.nodes_with("ServeReplica:offsite-ray:Engines")[-1]
        fault = time.monotonic()
        with lab.network.cut(number):
            time.sleep(_CUT_S)
        whole = wait_until(
            lambda: service.whole() and number in service.answering(), "the service is whole again"
        )
    return _outcome(service, fault, whole, [number], before, cut_s=_CUT_S)


def head_killed(lab: Lab) -> Outcome:
    """Kill -9 every process of the head under load, and start it again after ten seconds."""
    # As serve/gpu.yaml has it; it is on the third worker, where no engine is.
    with _served(lab, ingress_cpus=0.5) as service, service.load():
        before = service.tenants()
        next(node for node in lab.head.started if node.is_running).kill()
        fault = time.monotonic()
        time.sleep(10)
        lab.head.start_head()
        back = time.monotonic() - fault
        whole = wait_until(
            lambda: service.whole() and len(service.answering()) > 0, "the service is whole again"
        )
        nodes = len(lab.head.nodes())
    return _outcome(service, fault, back + whole, [], before, head_back_after_s=back, nodes=nodes)
