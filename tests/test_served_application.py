# SPDX-License-Identifier: Apache-2.0
"""What an administrator does with a running application, and what an operator sees of it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.adapters import make_adapter
from tests.dashboards import Scraper
from tests.deployed import BASE, Deployed, archive, deployed, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPT = "The cat sat"


@pytest.fixture(scope="module")
def second(served: Deployed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another adapter bundle for the plan of "full"."""
    out = tmp_path_factory.mktemp("second") / "adapter"
    make_adapter(served.tenants.full.parent / "bundle-full", out, method="full", noise=0.5)
    return out


@pytest.fixture
def model(served: Deployed) -> Iterator[str]:
    """A model that was uploaded, and goes with the test."""
    assert served.upload("acme", served.tenants.adapters["full"]).status_code == 200
    yield "acme"
    served.call("DELETE", "/admin/models/acme")


def text(served: Deployed, model: str, **given: Any) -> str:
    found: str = served.complete(model, PROMPT, **given)["choices"][0]["text"]
    return found


def test_an_upload_is_served_replaced_and_rolled_back(
    served: Deployed, model: str, second: Path
) -> None:
    first = text(served, model)
    assert first == text(served, "full")
    answer = served.upload(model, second)
    assert answer.status_code == 200, answer.text
    assert answer.json()["method"] == "full"
    assert "path" not in answer.json()
    changed = text(served, model)
    assert changed != first
    listed = served.call("GET", "/admin/models").json()[model]
    assert next(version["number"] for version in listed["versions"]) == listed["current"]
    assert len(listed["versions"]) == 2
    assert served.call("POST", f"/admin/models/{model}/rollback").status_code == 200
    assert text(served, model) == first
    refused = served.call("POST", f"/admin/models/{model}/rollback")
    assert refused.status_code == 409
    assert "no version before" in refused.json()["error"]["message"]
    assert text(served, model) == first


def test_a_model_that_is_removed_is_gone(served: Deployed) -> None:
    assert served.upload("gone", served.tenants.adapters["lora"]).status_code == 200
    assert text(served, "gone") == text(served, "lora")
    assert served.call("DELETE", "/admin/models/gone").status_code == 200
    asked = {"model": "gone", "prompt": PROMPT}
    assert served.call("POST", "/v1/completions", json=asked).status_code == 404
    assert served.call("DELETE", "/admin/models/gone").status_code == 404


def test_a_stream_that_has_begun_ends_with_the_version_it_began_with(
    served: Deployed, model: str, second: Path
) -> None:
    long = {"max_tokens": 40}
    before = text(served, model, **long)
    asked = {"model": model, "prompt": PROMPT, "temperature": 0, "stream": True, **long}
    with served.call("POST", "/v1/completions", json=asked, stream=True) as answer:
        lines = answer.iter_lines(decode_unicode=True)
        seen = [next(lines)]
        assert served.upload(model, second).status_code == 200
        seen += lines
    events = [line.removeprefix("data: ") for line in seen if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == before
    assert text(served, model, **long) != before


def damaged(adapter: Path, tmp_path: Path, kind: str) -> bytes:
    """Return an upload that must be refused."""
    copy = tmp_path / kind
    shutil.copytree(adapter, copy)
    weights = next(copy.glob("*.safetensors"))
    buffer = BytesIO()
    if kind == "no archive":
        return b"this is no archive at all" * 100
    if kind == "empty":
        return b""
    if kind == "altered":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(bytes(content))
    if kind == "a file short":
        weights.unlink()
    if kind == "a file more":
        (copy / "more.txt").write_text("x")
    if kind == "half":
        whole = archive(adapter)
        return whole[: len(whole) // 2]
    if kind in ("outside", "link", "sparse"):
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            info = tarfile.TarInfo("../../outside" if kind == "outside" else "offsite.json")
            if kind == "link":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            if kind == "sparse":
                info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "1000000000000"}
            tar.addfile(info, BytesIO(b""))
        return buffer.getvalue()
    if kind == "compressed":
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            tar.add(copy, arcname=".")
        return buffer.getvalue()
    return archive(copy)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no archive", "tar"),
        ("empty", "tar|manifest|offsite.json"),
        ("altered", "altered|differ|digest"),
        ("a file short", "lack|missing|no "),
        ("a file more", "more.txt"),
        ("half", "tar|altered|digest|lack"),
        ("outside", "one directory"),
        ("link", "one directory"),
        ("sparse", "one directory"),
        ("compressed", "not compressed"),
    ],
)
def test_a_damaged_upload_changes_nothing(
    served: Deployed, tmp_path: Path, kind: str, said: str
) -> None:
    before = served.call("GET", "/admin/models").json()
    answer = served.upload("full", damaged(served.tenants.adapters["full"], tmp_path, kind))
    assert answer.status_code in (400, 422), answer.text
    assert re.search(said, answer.json()["error"]["message"]), answer.text
    assert str(served.state) not in answer.text
    assert served.call("GET", "/admin/models").json() == before
    assert not list((served.state / "uploads").iterdir())
    assert not list(served.state.parent.glob("outside*"))


def test_an_adapter_of_another_model_is_refused(served: Deployed, tmp_path: Path) -> None:
    from offsite_ray.config import CompressConfig
    from offsite_ray.emulator import compress
    from tests.tiny_models import save_tiny

    other = save_tiny("gpt2", tmp_path / "other", seed=5, tie_word_embeddings=False)
    compress(CompressConfig(model=str(other), plan="1-4-1", out=str(tmp_path / "bundle")))
    make_adapter(tmp_path / "bundle", tmp_path / "adapter", method="full")
    answer = served.upload("full", tmp_path / "adapter")
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["code"] == "bundle_refused"


@pytest.mark.parametrize("name", [BASE, "-x", "a" * 64, "a b"])
def test_not_every_name_is_one(served: Deployed, name: str) -> None:
    answer = served.upload(name, served.tenants.adapters["lora"])
    assert answer.status_code in (400, 409), answer.text


def test_a_request_may_not_be_of_any_size(served: Deployed) -> None:
    long = {"model": "full", "prompt": "x" * (17 << 20)}
    answer = served.call("POST", "/v1/completions", json=long)
    assert answer.status_code == 413, answer.text
    # Without a key not even that is looked at.
    assert served.call("POST", "/v1/completions", None, data=b"{").status_code == 401
    assert served.call("PUT", "/admin/keys/admin/models", None, data=b"{").status_code == 401


def test_an_upload_that_breaks_off_leaves_nothing(served: Deployed) -> None:
    def parts() -> Iterator[bytes]:
        yield b"x" * 6_000_000
        raise ConnectionResetError

    with pytest.raises((requests.RequestException, ConnectionError)):
        served.call("PUT", "/admin/models/full", data=parts())
    eventually(lambda: not list((served.state / "uploads").iterdir()))


def test_who_goes_away_frees_the_row(served: Deployed) -> None:
    asked = {"model": "full", "prompt": PROMPT, "max_tokens": 50, "stream": True, "n": 4}
    for _ in range(6):  # three times as many rows as there are
        with served.call("POST", "/v1/completions", json=asked, stream=True) as answer:
            next(answer.iter_lines())
    began = time.monotonic()
    assert text(served, "full")
    assert time.monotonic() - began < 20


def test_more_than_fits_is_told_at_once(served: Deployed) -> None:
    asked = {"model": "full", "prompt": PROMPT, "max_tokens": 40, "n": 8}

    def ask(_: int) -> tuple[int, str | None]:
        answer = served.call("POST", "/v1/completions", json=asked)
        return answer.status_code, answer.headers.get("retry-after")

    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(ask, range(40)))
    statuses = [status for status, _ in found]
    assert set(statuses) == {200, 429}
    assert all(after == "1" for status, after in found if status == 429)
    assert text(served, "full")


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_a_request_wait_for_a_place_once_one_has_it(
    served: Deployed, stream: bool
) -> None:
    prompts = [f"The cat {number}" for number in range(12)]

    def ask(model: str) -> dict[int, str]:
        asked = {"model": model, "prompt": prompts, "temperature": 0, "max_tokens": 30, "n": 4}
        for _ in range(60):  # who was refused lately, as by the test before, may have to ask again
            answer = served.call("POST", "/v1/completions", json={**asked, "stream": stream})
            if answer.status_code != 429:
                break
            time.sleep(float(answer.headers["retry-after"]))
        assert answer.status_code == 200, answer.text
        whole = [answer.json()] if not stream else events(answer.text)
        texts = dict.fromkeys(range(48), "")
        for choice in (choice for part in whole for choice in part["choices"]):
            texts[choice["index"]] += choice["text"]
        return texts

    models = ["full", "lora", "bitfit"]
    with ThreadPoolExecutor(3) as pool:  # 24 at a time, and there are two places and eight to wait
        found = list(pool.map(ask, models))
    for model, texts in zip(models, found, strict=True):
        for place in (0, 11):
            alone = served.complete(model, prompts[place], max_tokens=30)["choices"][0]["text"]
            assert {texts[4 * place + index] for index in range(4)} == {alone}


def events(text: str) -> list[dict[str, Any]]:
    """Return the objects of a whole stream."""
    *parts, end = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert end == "[DONE]", end
    return [json.loads(part) for part in parts]


def test_what_is_measured_is_given_to_prometheus(served: Deployed) -> None:
    answer = text(served, "bitfit")
    assert answer is not None

    def metrics() -> str:
        return requests.get(served.metrics, timeout=30).text

    wanted = [
        "offsite_ray_requests_total{",
        'model="bitfit"',
        "offsite_ray_time_to_first_token_seconds_bucket{",
        "offsite_ray_inter_token_latency_seconds_bucket{",
        "offsite_ray_answer_tokens_total{",
        "offsite_ray_requests_waiting{",
        "offsite_ray_batch_occupancy{",
        "offsite_ray_cache_use{",
        "offsite_ray_versions_loaded_total{",
        "offsite_ray_tenants_brought_total{",
    ]
    eventually(lambda: all(one in metrics() for one in wanted), 40)
    found = Scraper(served.metrics)
    found.take(metrics())
    assert found.missing("serving") == {}


def test_openapi_lists_the_routes_and_its_page_loads_nothing_from_elsewhere(
    served: Deployed,
) -> None:
    paths = served.call("GET", "/openapi.json", None).json()["paths"]
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/admin/models/{name}"} <= {
        *paths
    }
    page = served.call("GET", "/docs", None).text
    assert "http://" not in page.replace(served.url, "")
    assert "https://" not in page


def test_everything_is_as_it_was_after_a_restart(served: Deployed, tmp_path: Path) -> None:
    tenants = served.tenants
    state = tmp_path / "state"
    with deployed(tenants, state) as first:
        assert first.upload("full", tenants.adapters["lora"]).status_code == 200
        assert first.call("DELETE", "/admin/models/bitfit").status_code == 200
        assert first.upload("new", tenants.adapters["full"]).status_code == 200
        assert first.call("PUT", "/admin/models/new/pin").status_code == 200
        first.add_key("service", "new", per_minute=600)
        before = first.call("GET", "/admin/models").json()
        keys = first.call("GET", "/admin/keys").json()
        said = text(first, "full")
        assert first.stop() == 0
    with deployed(tenants, state) as again:
        # Adapters that the command names are taken in once: what the administrator did stays.
        assert again.call("GET", "/admin/models").json() == before
        assert again.call("GET", "/admin/keys").json() == keys
        assert again.keys["admin"] == first.keys["admin"]
        assert text(again, "full") == said
        again.keys["service"] = first.keys["service"]
        answer = again.call("GET", "/v1/models", "service").json()
        assert [one["id"] for one in answer["data"]] == ["new"]
        asked = {"model": "new", "prompt": PROMPT, "max_tokens": 50, "n": 4, "stream": True}
        with again.call("POST", "/v1/completions", json=asked, stream=True) as begun:
            lines = begun.iter_lines(decode_unicode=True)
            first = next(lines)
            again.process.send_signal(signal.SIGTERM)
            events = [first, *filter(None, lines)]
        assert events[-1] == "data: [DONE]"
        assert again.stop() == 0
