# SPDX-License-Identifier: Apache-2.0
"""Replicas that die under load, disks that are full, engines that hang."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.deployed import Deployed, deployed, eventually, make_served
from tests.disks import small_disk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPT = "The cat sat"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """An application with two replicas of the engine."""
    root = tmp_path_factory.mktemp("two")
    given = {"min_replicas": 2, "max_replicas": 2, "max_queue": 32}
    with deployed(make_served(root, num_positions=1024), root / "state", **given) as running:
        eventually(lambda: len(running.replicas()) == 2)
        yield running


def test_a_replica_that_is_killed_costs_no_request_that_was_not_streaming(two: Deployed) -> None:
    expected = two.complete("full", PROMPT, max_tokens=40)["choices"][0]["text"]
    asked = {"model": "full", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}

    def ask(_: int) -> tuple[int, str]:
        answer = two.call("POST", "/v1/completions", json=asked)
        found = answer.json()
        return answer.status_code, found["choices"][0]["text"] if answer.ok else answer.text

    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(ask, range(60))
        time.sleep(0.5)
        victim = two.replicas()[0]
        victim.kill()
        began = time.monotonic()
        assert set(answers) == {(200, expected)}
    eventually(lambda: len(two.replicas()) == 2 and not victim.is_running(), 60)
    print(f"whole again after {time.monotonic() - began:.1f} s")


def test_a_stream_that_is_cut_off_says_so(two: Deployed) -> None:
    client = openai.OpenAI(base_url=f"{two.url}/v1", api_key=two.keys["admin"], max_retries=0)
    wish: dict[str, Any] = {"model": "full", "prompt": "a", "max_tokens": 1000, "temperature": 0}
    victims = two.replicas()  # found before: a stream does not last for long
    streams = [iter(client.completions.create(**wish, stream=True)) for _ in range(6)]
    for stream in streams:
        next(stream)
    for victim in victims:
        victim.kill()
    said = []
    for stream in streams:
        try:
            said.append(str(list(stream)[-1].choices[0].finish_reason))
        except openai.APIError as error:
            said.append(str(error))
    cut = [one for one in said if "was lost" in one]
    assert cut
    assert {*said} - {*cut} <= {"stop", "length"}
    eventually(lambda: len(two.replicas()) == 2, 60)
    assert two.complete("full", PROMPT)["choices"][0]["text"]


def test_the_health_is_that_of_the_engines(two: Deployed) -> None:
    def health() -> int:
        return two.call("GET", "/health", None).status_code

    eventually(lambda: health() == 200, 60)
    two.replicas()[0].kill()
    time.sleep(1.5)  # what was known before is not heeded any more
    eventually(lambda: health() == 200, 60)  # the other may be new, and not be ready yet
    for replica in two.replicas():
        replica.kill()
    eventually(lambda: health() == 503)
    eventually(lambda: health() == 200 and len(two.replicas()) == 2, 60)
    assert two.complete("full", PROMPT)["choices"][0]["text"]


def test_the_store_may_die_and_nobody_notices(two: Deployed) -> None:
    before = two.call("GET", "/admin/models").json()
    (victim,) = two.replicas("Store")
    victim.kill()
    for _ in range(10):
        assert two.complete("full", PROMPT, max_tokens=2)
    eventually(lambda: two.call("GET", "/admin/models").status_code == 200, 60)
    assert two.call("GET", "/admin/models").json() == before
    assert two.upload("after", two.tenants.adapters["lora"]).status_code == 200
    assert two.complete("after", PROMPT)["choices"][0]["text"]


@pytest.mark.long
def test_an_engine_that_hangs_is_given_up(tmp_path: Path) -> None:
    tenants = make_served(tmp_path / "served")
    with deployed(tenants, tmp_path / "state", request_timeout=4) as hanging:
        asked = {"model": "full", "prompt": PROMPT, "max_tokens": 50, "n": 4}
        with hanging.call(
            "POST", "/v1/completions", json={**asked, "stream": True}, stream=True
        ) as answer:
            lines = answer.iter_lines(decode_unicode=True)
            first = next(lines)
            (engine,) = hanging.replicas()
            engine.suspend()
            try:
                whole = hanging.call("POST", "/v1/completions", json=asked)
                ill = hanging.call("GET", "/health", None)
                events = [first, *filter(None, lines)]
            finally:
                engine.resume()
        assert whole.status_code == 504, whole.text
        assert whole.json()["error"]["code"] == "timeout"
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert ill.status_code == 503, ill.text
        assert ill.json()["error"]["message"].startswith("no engine answers; ")
        eventually(lambda: hanging.call("GET", "/health", None).status_code == 200)
        assert hanging.complete("full", PROMPT)["choices"][0]["text"]


def test_a_full_disk_refuses_uploads_and_serves_on(two: Deployed) -> None:
    before = two.call("GET", "/admin/models").json()
    with small_disk(two.state / "uploads", 40_000):
        if not os.path.ismount(two.state / "uploads"):
            pytest.skip("a small disk cannot be mounted here")
        answer = two.upload("full", two.tenants.adapters["full"])
        assert answer.status_code == 507, answer.text
        assert answer.json()["error"]["code"] == "no_storage"
        assert two.complete("full", PROMPT)["choices"][0]["text"]
        assert not list((two.state / "uploads").iterdir())
    assert two.call("GET", "/admin/models").json() == before


def test_prompts_are_in_no_log(two: Deployed) -> None:
    secret = "tell me of xyzzy"
    two.complete("full", secret)
    answer = two.call("POST", "/v1/completions", json={"model": "nobody", "prompt": secret})
    request = answer.headers["x-request-id"]
    eventually(lambda: any(request in path.read_text() for path in two.logs()))
    logs = two.logs()
    lines = [line for path in logs for line in path.read_text().splitlines() if request in line]
    facts = json.loads(lines[0])["offsite_ray"]
    assert facts["status"] == 404
    assert facts["key"] == "admin"
    assert facts["path"] == "/v1/completions"
    for path in logs:
        assert "xyzzy" not in path.read_text()
        assert two.keys["admin"] not in path.read_text()
