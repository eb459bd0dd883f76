# SPDX-License-Identifier: Apache-2.0
"""Every key on every route with every model: what is not given does not exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.deployed import BASE, Deployed, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

MODELS = ("full", "lora", BASE, "nobody")
KEYS: dict[str | None, tuple[str, ...]] = {
    "of full": ("full",),
    "of lora": ("lora",),
    "of both": ("full", "lora", BASE),
    "of none": (),
    "of nobody": ("nobody",),
    "admin": ("full", "lora", BASE),
    "sk-unknown": (),
    None: (),
}
"""Key to the models that it may see and use; the unknown one and none at all see nothing."""
UNKNOWN = ("sk-unknown", None)


@pytest.fixture(scope="module")
def keyed(served: Deployed) -> Iterator[Deployed]:
    labels = [label for label in KEYS if label is not None and label.startswith("of ")]
    for label in labels:
        granted = ("nobody",) if label == "of nobody" else KEYS[label]
        served.add_key(label, *granted)
    yield served
    for label in labels:
        served.call("DELETE", f"/admin/keys/{label}")
        del served.keys[label]


def routes(model: str) -> dict[str, dict[str, Any]]:
    """Return the requests that name a model."""
    said = [{"role": "user", "content": "hi"}]
    wish = {"model": model, "max_tokens": 1}
    return {
        f"GET /v1/models/{model}": {},
        "POST /v1/completions": {"json": {**wish, "prompt": "a"}},
        "POST /v1/completions ": {"json": {**wish, "prompt": "a", "stream": True}},
        "POST /v1/chat/completions": {"json": {**wish, "messages": said}},
        "POST /v1/chat/completions ": {"json": {**wish, "messages": said, "stream": True}},
    }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("key", KEYS)
def test_a_key_uses_its_models_and_no_other(keyed: Deployed, key: str | None, model: str) -> None:
    for route, given in routes(model).items():
        method, path = route.split()
        answer = keyed.call(method, path, key, **given)
        if key in UNKNOWN:
            assert answer.status_code == 401, route
            assert answer.json()["error"]["code"] == "invalid_api_key"
        elif model in KEYS[key] and model != "nobody":
            assert answer.status_code == 200, (route, answer.text)
        else:
            # Word for word what is said of a model that there is not.
            assert answer.status_code == 404, route
            error = answer.json()["error"]
            assert error["message"] == f"there is no model {model!r}"
            assert error["code"] == "model_not_found"


@pytest.mark.parametrize("key", KEYS)
def test_a_key_sees_its_models_and_no_other(keyed: Deployed, key: str | None) -> None:
    answer = keyed.call("GET", "/v1/models", key)
    if key in UNKNOWN:
        assert answer.status_code == 401
        return
    seen = {model["id"] for model in answer.json()["data"]}
    expected = set(KEYS[key]) - {"nobody"}
    assert (seen >= expected) if key == "admin" else (seen == expected)


@pytest.mark.parametrize("key", KEYS)
def test_only_the_administrator_changes_what_is_served(keyed: Deployed, key: str | None) -> None:
    if key == "admin":
        return
    for method, path, given in (
        ("GET", "/admin/models", {}),
        ("PUT", "/admin/models/full", {"data": b"x"}),
        ("PUT", "/admin/models/nobody", {"data": b"x"}),
        ("DELETE", "/admin/models/full", {}),
        ("DELETE", "/admin/models/nobody", {}),
        ("POST", "/admin/models/full/rollback", {}),
        ("PUT", "/admin/models/full/pin", {}),
        ("DELETE", "/admin/models/full/pin", {}),
        ("GET", "/admin/keys", {}),
        ("POST", "/admin/keys", {"json": {"label": "mine", "admin": True}}),
        ("PUT", "/admin/keys/of full/models", {"json": {"models": ["lora"]}}),
        ("DELETE", "/admin/keys/admin", {}),
    ):
        answer = keyed.call(method, path, key, **given)
        assert answer.status_code == (401 if key in UNKNOWN else 403), (path, answer.text)
    listed = keyed.call("GET", "/admin/keys").json()
    assert {one["label"] for one in listed} >= {"admin", "of full"}
    assert "mine" not in {one["label"] for one in listed}
    assert next(one["models"] for one in listed if one["label"] == "of full") == ["full"]


def test_what_a_key_may_use_can_be_changed_and_taken_away(keyed: Deployed) -> None:
    keyed.add_key("of a while", "full")

    def seen() -> list[str]:
        answer = keyed.call("GET", "/v1/models", "of a while")
        return [model["id"] for model in answer.json().get("data", [])]

    assert seen() == ["full"]
    changed = keyed.call("PUT", "/admin/keys/of a while/models", json={"models": ["lora"]})
    assert changed.json() == {"label": "of a while", "models": ["lora"]}
    typo = keyed.call("PUT", "/admin/keys/of a while/models", json={"models": ["lora", "lorra"]})
    assert typo.json()["unknown_models"] == ["lorra"]
    eventually(lambda: seen() == ["lora"])
    assert keyed.call("DELETE", "/admin/keys/of a while").status_code == 200
    eventually(lambda: keyed.call("GET", "/v1/models", "of a while").status_code == 401)


def test_pages_need_no_key_and_hold_none(keyed: Deployed) -> None:
    for path in ("/", "/docs", "/openapi.json", "/health"):
        answer = keyed.call("GET", path, None)
        assert answer.status_code == 200, path
        assert keyed.keys["admin"] not in answer.text


def test_keys_are_told_once_and_nowhere_kept(keyed: Deployed) -> None:
    listed = keyed.call("GET", "/admin/keys").text
    files = [path for path in keyed.state.iterdir() if path.is_file() and path.name != "admin.key"]
    for key in keyed.keys.values():
        assert key not in listed
        assert all(key.encode() not in path.read_bytes() for path in files)
    assert (keyed.state / "admin.key").stat().st_mode & 0o777 == 0o600
