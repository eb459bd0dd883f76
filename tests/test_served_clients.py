# SPDX-License-Identifier: Apache-2.0
"""A running application, and clients that no one here wrote: openai, lm-eval, curl."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import openai
import pytest
import torch

from offsite_ray.architectures import load_model, load_tokenizer
from tests.deployed import BASE, Deployed
from tests.questions import GENERATING, own_task
from tests.served import generated

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = "The cat sat"
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def client(served: Deployed) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.keys["admin"], max_retries=0)


@pytest.fixture(scope="module")
def expected(served: Deployed) -> dict[str, str]:
    """What stock ``generate`` makes of the prompt with each plugged-in model directory."""
    tokenizer = load_tokenizer(served.tenants.full)
    ids = tokenizer(PROMPT)["input_ids"]
    directories = {**served.tenants.plugged_in, BASE: served.tenants.full}
    found = {}
    for name, path in directories.items():
        tokens = generated(path, ids, NUM_TOKENS)
        ends = [place for place, token in enumerate(tokens) if token == tokenizer.eos_token_id]
        kept = tokens[: ends[0]] if ends else tokens
        found[name] = str(tokenizer.decode(kept, skip_special_tokens=True))
    return found


def test_models_are_listed(served: Deployed, client: openai.OpenAI) -> None:
    names = sorted([*served.tenants.adapters, BASE])
    assert [model.id for model in client.models.list()] == names
    assert client.models.retrieve("lora").id == "lora"


@pytest.mark.parametrize("name", ["full", "lora", "bottleneck", "bitfit", BASE])
def test_completions_are_those_of_the_plugged_in_model(
    client: openai.OpenAI, expected: dict[str, str], name: str
) -> None:
    wish: dict[str, Any] = {"model": name, "prompt": PROMPT, "max_tokens": NUM_TOKENS}
    whole = client.completions.create(**wish, temperature=0)
    assert whole.choices[0].text == expected[name]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(PROMPT)
    assert whole.usage.total_tokens == len(PROMPT) + whole.usage.completion_tokens
    parts = list(
        client.completions.create(
            **wish, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(part.choices[0].text for part in parts if part.choices) == expected[name]
    assert parts[-1].usage == whole.usage
    assert not parts[-1].choices
    assert len({part.id for part in parts}) == 1


def test_tenants_answer_differently(expected: dict[str, str]) -> None:
    assert len(set(expected.values())) > 1  # else the tests above would show nothing


def test_chat_goes_through_the_template(served: Deployed, client: openai.OpenAI) -> None:
    said: Any = [{"role": "user", "content": "hi"}]
    tokenizer = load_tokenizer(served.tenants.full)
    text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    plain = client.completions.create(model="full", prompt=text, temperature=0, max_tokens=8)
    whole = client.chat.completions.create(
        model="full", messages=said, temperature=0, max_tokens=8, logprobs=True, top_logprobs=2
    )
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == plain.choices[0].text
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == whole.usage.completion_tokens  # type: ignore[union-attr]
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    parts = list(
        client.chat.completions.create(
            model="full", messages=said, temperature=0, max_tokens=8, stream=True
        )
    )
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == plain.choices[0].text
    assert parts[-1].choices[0].finish_reason in ("stop", "length")


def test_what_clients_send_by_default_changes_nothing(client: openai.OpenAI) -> None:
    said: Any = [{"role": "user", "content": "hi"}]
    wish: dict[str, Any] = {"model": "full", "temperature": 0, "max_tokens": 8}
    harmless: dict[str, Any] = {
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "stop": None,
        "logit_bias": {},
        "store": False,
        "metadata": {"run": "7"},
        "user": "me",
        "n": 1,
    }
    plain = client.chat.completions.create(messages=said, **wish)
    first = client.chat.completions.create(messages=said, **wish, **harmless)
    assert first.choices == plain.choices
    # A conversation goes on with the answer as the client got it.
    answer: Any = first.choices[0].message.model_dump()
    assert client.chat.completions.create(messages=[*said, answer, *said], **wish).choices
    with pytest.raises(openai.BadRequestError, match="asks for what is not served") as refused:
        client.chat.completions.create(
            messages=said, **wish, response_format={"type": "json_object"}
        )
    assert refused.value.param == "response_format"


def test_several_prompts_and_texts(client: openai.OpenAI, expected: dict[str, str]) -> None:
    answer = client.completions.create(
        model="full", prompt=[PROMPT, "x", PROMPT], n=2, temperature=0, max_tokens=NUM_TOKENS
    )
    assert [choice.index for choice in answer.choices] == [*range(6)]
    assert {answer.choices[place].text for place in (0, 1, 4, 5)} == {expected["full"]}
    parts = client.completions.create(
        model="full", prompt=[PROMPT, "x"], n=2, temperature=0, max_tokens=NUM_TOKENS, stream=True
    )
    texts = dict.fromkeys(range(4), "")
    for part in parts:
        texts[part.choices[0].index] += part.choices[0].text
    assert texts[0] == texts[1] == expected["full"]
    assert texts[2] == texts[3] == answer.choices[2].text


def test_a_prompt_is_repeated_with_its_log_probabilities(
    served: Deployed, client: openai.OpenAI
) -> None:
    answer = client.completions.create(
        model="lora", prompt=PROMPT, echo=True, logprobs=2, max_tokens=1, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text.startswith(PROMPT)
    tokenizer = load_tokenizer(served.tenants.full)
    ids = tokenizer(PROMPT)["input_ids"]
    model = load_model(served.tenants.plugged_in["lora"])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    assert choice.logprobs is not None
    found = choice.logprobs.token_logprobs
    assert found is not None
    assert found[0] is None
    for place in range(1, len(ids)):
        # Far from the model that it was, and computed in other shapes: float32 differs by that.
        assert found[place] == pytest.approx(float(logprobs[place - 1, ids[place]]), abs=1e-4)
    assert choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens[: len(ids)]) == PROMPT
    assert choice.logprobs.text_offset is not None
    assert choice.logprobs.text_offset[:3] == [0, 1, 2]
    parts = client.completions.create(
        model="lora", prompt=PROMPT, echo=True, logprobs=2, max_tokens=1, temperature=0, stream=True
    )
    offsets = [part.choices[0].logprobs.text_offset for part in parts if part.choices[0].logprobs]
    assert len(offsets) > 1
    assert [offset for part in offsets for offset in part or []] == choice.logprobs.text_offset


def test_errors_are_those_of_openai(served: Deployed, client: openai.OpenAI) -> None:
    def ask(**given: Any) -> Any:
        return client.completions.create(**{"model": "full", "prompt": PROMPT, **given})

    with pytest.raises(openai.NotFoundError, match="there is no model 'nobody'") as missing:
        ask(model="nobody")
    assert missing.value.code == "model_not_found"
    for given, said in (
        ({"prompt": ""}, "no token"),
        ({"prompt": [[5, 10**6]]}, "vocabulary"),
        ({"prompt": "x" * 60, "max_tokens": 60}, "that fit"),
        ({"max_tokens": 10**6}, "up to 2048 are allowed"),
        ({"temperature": 3}, "temperature"),
        ({"stop": ["a"] * 9}, "stop takes up to 4"),
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
        ({"extra_body": {"max_token": 1}}, "no such field; did you mean 'max_tokens'"),
    ):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=said):
                ask(stream=stream, **given)
    stranger = openai.OpenAI(base_url=f"{served.url}/v1", api_key="sk-none", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as denied:
        stranger.models.list()
    assert denied.value.code == "invalid_api_key"
    for method, path, status in (("GET", "nothing", 404), ("DELETE", "completions", 405)):
        answer = served.call(method, f"/v1/{path}")
        assert answer.status_code == status
        assert answer.json()["error"]["message"].startswith(f"{method} /v1/{path}: ")


def test_a_rate_limit_says_when_to_come_again(served: Deployed) -> None:
    key = served.add_key("slow", "full", per_minute=1)
    slow = openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)
    assert [model.id for model in slow.models.list()] == ["full"]
    with pytest.raises(openai.RateLimitError) as limited:
        slow.models.list()
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60
    served.call("DELETE", "/admin/keys/slow")


def test_lm_eval_scores_the_endpoint_as_it_scores_the_model(
    served: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("OPENAI_API_KEY", served.keys["admin"])
    documents = str(tmp_path / "sums.jsonl")
    own_task(tmp_path, file=documents)
    own_task(tmp_path, "writing", file=documents, **GENERATING)
    directory = served.tenants.plugged_in["full"]
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def scores(kind: str, **arguments: Any) -> Any:
        found = lm_eval.simple_evaluate(
            model=kind,
            model_args=arguments,
            tasks=["sums", "writing"],
            task_manager=tasks,
            log_samples=True,
            bootstrap_iters=0,
        )
        assert found is not None
        return found

    endpoint = scores(
        "local-completions",
        model="full",
        base_url=f"{served.url}/v1/completions",
        tokenizer=str(directory),
        tokenizer_backend="huggingface",
        max_length=64,
        num_concurrent=2,
    )
    memory = scores("hf", pretrained=str(directory), device="cpu", max_length=64, dtype="float32")
    assert endpoint["results"] == memory["results"]
    for one, other in zip(endpoint["samples"]["sums"], memory["samples"]["sums"], strict=True):
        for found, wanted in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert found[0] == pytest.approx(wanted[0], abs=1e-4)
    written = [sample["filtered_resps"] for sample in endpoint["samples"]["writing"]]
    assert written == [sample["filtered_resps"] for sample in memory["samples"]["writing"]]
    assert any(any(texts) for texts in written)


def test_curl_streams(served: Deployed, expected: dict[str, str]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl is installed")
    wish = {"model": "full", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    done = subprocess.run(
        ["curl", "-sS", "-N", "-i", f"{served.url}/v1/completions", "-H",
         f"Authorization: Bearer {served.keys['admin']}", "-H", "Content-Type: application/json",
         "-H", "X-Request-Id: mine-1", "-d", json.dumps({**wish, "stream": True})],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    head, _, body = done.stdout.replace("\r\n", "\n").partition("\n\n")
    assert "200 OK" in head
    assert "text/event-stream" in head
    assert head.lower().count("x-request-id: mine-1") == 1
    events = [line.removeprefix("data: ") for line in body.splitlines() if line]
    assert events[-1] == "[DONE]"
    texts = [json.loads(event)["choices"][0]["text"] for event in events[:-1]]
    assert "".join(texts) == expected["full"]
