# SPDX-License-Identifier: Apache-2.0
"""A running application under load: latencies, memory, overload, and a replica that is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CONCURRENCY = 16
PROMPT_WORDS = 64
ANSWER_TOKENS = (16, 48)
"""From and to: rows become free one by one, as with real answers."""


@dataclass(kw_only=True)
class Service:
    """A running application."""

    url: str
    key: str
    process: subprocess.Popen[str]
    models: Sequence[str]
    logs: Path

    def ready(self) -> int:
        """Return how many engines have ever come to serve all models, by what they logged."""
        texts = (path.read_text() for path in self.logs.glob("replica_offsite-ray_Engines_*.log"))
        return sum(text.count(") is served") >= len(self.models) for text in texts)

    def processes(self, deployment: str = "") -> list[psutil.Process]:
        """Return the processes of replicas, of one deployment or of all."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if f"ServeReplica:offsite-ray:{deployment}" in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def resident(self) -> dict[str, int]:
        """Return the bytes that the replicas have in memory, by deployment."""
        found: dict[str, int] = {}
        for process in self.processes():
            name = " ".join(process.cmdline()).split(":")[4].strip()
            found[name] = found.get(name, 0) + process.memory_info().rss
        return found


@dataclass(kw_only=True)
class Load:
    """What clients saw."""

    first_s: list[float] = field(default_factory=list)
    """Time to the first token of each answer."""
    between_s: list[float] = field(default_factory=list)
    """Between the tokens of an answer, on average, of each answer."""
    tokens: int = 0
    seconds: float = 0.0
    refused: int = 0
    """Answered with 429."""
    refused_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return it in figures."""
        return {
            "answers": len(self.first_s),
            "refused": self.refused,
            "errors": len(self.errors),
            "first_errors": self.errors[:3],
            "answers_per_s": len(self.first_s) / self.seconds if self.seconds else None,
            "tokens_per_s": self.tokens / self.seconds if self.seconds else None,
            "time_to_first_token": quantiles(self.first_s),
            "between_tokens": quantiles(self.between_s),
            "refusal": quantiles(self.refused_s),
        }


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Return median and 99th percentile, in seconds."""
    if len(values) < 2:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98], "max": max(values)}


@contextlib.contextmanager
def service(folder: Path, state: Path, models: Sequence[str], **flags: Any) -> Iterator[Service]:
    """Serve as many models as names, each a copy of the adapter bundle of full blocks."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    words += [f"--adapter={name}={folder / 'adapter-full'}" for name in models]
    process = subprocess.Popen(
        [sys.executable, "-m", "offsite_ray", "serve", "--json", f"--model={folder / 'full'}",
         f"--state={state}", f"--port={port}", *words],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        text = ""
        while not text.rstrip().endswith("}"):
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("offsite-ray serve has ended")
            text += line
        said = json.loads(text)
        key = Path(said["admin_key_file"]).read_text().strip()
        yield Service(
            url=said["url"], key=key, process=process, models=models, logs=Path(said["logs"])
        )
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        shutil.rmtree(state, ignore_errors=True)


async def one(session: aiohttp.ClientSession, served: Service, load: Load, number: int) -> None:
    """Send a request and read its stream."""
    draw = random.Random(number)
    prompt = " ".join(f"t{draw.randrange(50_000)}" for _ in range(PROMPT_WORDS))
    asked = {
        "model": served.models[number % len(served.models)],
        "prompt": prompt,
        "max_tokens": draw.randint(*ANSWER_TOKENS),
        "temperature": 0,
        "stream": True,
    }
    began, times = time.perf_counter(), []
    try:
        async with session.post(f"{served.url}/v1/completions", json=asked) as answer:
            if answer.status == 429:
                load.refused += 1
                load.refused_s.append(time.perf_counter() - began)
                return
            if answer.status != 200:
                load.errors.append(f"{answer.status}: {await answer.text()}")
                return
            async for line in answer.content:
                if line.startswith(b'data: {"error'):
                    load.errors.append(line.decode())
                    return
                if line.startswith(b"data: {"):
                    times.append(time.perf_counter())
    except (aiohttp.ClientError, TimeoutError) as error:
        load.errors.append(repr(error))
        return
    load.tokens += len(times)
    load.first_s.append(times[0] - began)
    if len(times) > 1:
        load.between_s.append((times[-1] - times[0]) / (len(times) - 1))


def _session(served: Service) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {served.key}"},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=300),
    )


async def _drive(served: Service, concurrency: int, seconds: float) -> Load:
    load, numbers = Load(), iter(range(10**9))
    until = time.monotonic() + seconds
    began = time.perf_counter()
    async with _session(served) as session:

        async def client() -> None:
            while time.monotonic() < until:
                refused = load.refused
                await one(session, served, load, next(numbers))
                if load.refused > refused:
                    await asyncio.sleep(1.0)  # as Retry-After says

        await asyncio.gather(*(client() for _ in range(concurrency)))
    load.seconds = time.perf_counter() - began
    return load


def drive(served: Service, concurrency: int, seconds: float) -> Load:
    """Keep as many requests in flight for some time."""
    return asyncio.run(_drive(served, concurrency, seconds))


async def _flood(served: Service, per_s: float, seconds: float) -> Load:
    load, draw = Load(), random.Random(0)
    began = time.perf_counter()
    async with _session(served) as session, asyncio.TaskGroup() as clients:
        due, number = began, 0
        while (due := due + draw.expovariate(per_s)) < began + seconds:
            await asyncio.sleep(due - time.perf_counter())
            clients.create_task(one(session, served, load, number))
            number += 1
    load.seconds = time.perf_counter() - began
    return load


def flood(served: Service, per_s: float, seconds: float) -> Load:
    """Send so many requests a second, at random times (Poisson), whatever is answered."""
    return asyncio.run(_flood(served, per_s, seconds))


def with_hey(served: Service, number: int, concurrency: int) -> dict[str, Any] | None:
    """Send whole requests with ``hey``; None where it is not installed."""
    tool = shutil.which("hey")
    if tool is None:
        return None
    body = {"model": served.models[0], "prompt": "t1 t2 t3", "max_tokens": 8, "temperature": 0}
    done = subprocess.run(
        [tool, "-n", str(number), "-c", str(concurrency), "-z", "0", "-t", "120", "-m", "POST",
         "-T", "application/json", "-H", f"Authorization: Bearer {served.key}",
         "-d", json.dumps(body), f"{served.url}/v1/completions"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    statuses = re.findall(r"\[(\d{3})\]\s+(\d+) responses", done.stdout)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    return {
        "statuses": {status: int(count) for status, count in statuses},
        "requests_per_s": float(rate[1]) if rate else None,
    }


def steady(served: Service, seconds: float) -> dict[str, Any]:
    """Load for a long time; memory after a tenth of it, and at the end."""
    warm = drive(served, CONCURRENCY, seconds / 10)
    before = served.resident()
    load = drive(served, CONCURRENCY, seconds * 0.9)
    after = served.resident()
    load.errors += warm.errors
    return {
        **load.summary(),
        "seconds": seconds,
        "bytes_before": before,
        "bytes_after": after,
        "growth": {name: after[name] / before[name] - 1 for name in before},
    }


def killed(served: Service, seconds: float) -> dict[str, Any]:
    """Kill one of two replicas under load; what clients saw, and when all is whole again."""
    found: dict[str, float] = {}

    async def murder() -> None:
        await asyncio.sleep(seconds / 4)
        victim = (await asyncio.to_thread(served.processes, "Engines"))[0]
        before = served.ready()
        os.kill(victim.pid, signal.SIGKILL)
        began = time.monotonic()
        while served.ready() == before:
            await asyncio.sleep(0.2)
        found["whole_again_s"] = time.monotonic() - began

    async def both() -> Load:
        load, _ = await asyncio.gather(_drive(served, CONCURRENCY, seconds), murder())
        return load

    load = asyncio.run(both())
    return {**load.summary(), **found}
