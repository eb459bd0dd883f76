# SPDX-License-Identifier: Apache-2.0
"""What clients may send though it is not served: only what asks for nothing."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from offsite_ray.serving.failures import failure_of
from offsite_ray.serving.protocol import ChatRequest, CompletionRequest

SAID: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


def chat(**given: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "acme", "messages": SAID, **given})


@pytest.mark.parametrize(
    "given",
    [
        {"response_format": {"type": "text"}},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"tool_choice": "auto"},
        {"tools": None, "tool_choice": None, "response_format": None, "logit_bias": None},
        {"stop": None, "n": 1, "user": "me", "store": False, "metadata": {"run": "7"}},
        {"logit_bias": {}, "frequency_penalty": 0.0, "presence_penalty": 0},
        {"stream_options": {"include_usage": None, "include_obfuscation": False}},
        {"stream_options": None, "stream": None, "temperature": None, "top_p": None, "n": None},
        {
            "messages": [
                *SAID,
                {"role": "assistant", "content": "ho", "refusal": None, "tool_calls": None,
                 "annotations": [], "audio": None, "function_call": None},
                *SAID,
            ]
        },
    ],
)  # fmt: skip
def test_what_asks_for_nothing_is_taken(given: dict[str, Any]) -> None:
    assert chat(**given).sampling(9) == chat().sampling(9)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"response_format": {"type": "json_object"}}, 'or send {"type": "text"}'),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "leave it out, or send []"),
        ({"tool_choice": "required"}, '"required" asks for what is not served'),
        ({"tool_choice": {"type": "function"}}, 'or send "none", or send "auto"'),
        ({"logit_bias": {"50": 100}}, "leave it out, or send {}"),
        ({"frequency_penalty": 1.0}, "1.0 asks for what is not served; leave it out, or send 0"),
        ({"store": True}, "or send false"),
        ({"messages": [{**SAID[0], "tool_calls": [{"id": "x"}]}]}, "or send []"),
        ({"stream_options": {"include_obfuscation": True}}, "or send false"),
        ({"no_such_field": 1}, "Extra inputs"),
    ],
)
def test_what_asks_for_more_is_refused_with_what_is_allowed(
    given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        chat(**given)
    (error,) = refused.value.errors()
    assert error["loc"][0] in given
    assert said in error["msg"]


def test_completions_take_what_changes_nothing() -> None:
    plain: dict[str, Any] = {"model": "acme", "prompt": "x"}
    harmless = CompletionRequest.model_validate({**plain, "suffix": "", "best_of": 1, "echo": None})
    assert harmless.sampling() == CompletionRequest.model_validate(plain).sampling()
    with pytest.raises(ValidationError, match="2 asks for what is not served"):
        CompletionRequest.model_validate({**plain, "best_of": 2})


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": [-1] * 5000},
        {"prompt": [[-1] * 50] * 60},
        {"prompt": "x", "stop": [1] * 5000},
        {"prompt": "x", "logit_bias": {str(number): "a" for number in range(5000)}},
        {"prompt": "x", **{f"no{number}": 1 for number in range(5000)}},
        {"messages": [{"role": "user", "content": [{"type": "image"}] * 5000}]},
        {"messages": [{"role": "user", "content": "x", "audio": 1}] * 1000},
    ],
    ids=["tokens", "prompts", "stop", "bias", "keys", "parts", "messages"],
)
def test_a_client_is_told_of_a_few_mistakes_however_many_it_makes(given: dict[str, Any]) -> None:
    kind = ChatRequest if "messages" in given else CompletionRequest
    with pytest.raises(ValidationError) as refused:
        kind.model_validate({"model": "acme", **given})
    assert len(refused.value.errors()) < 10


@pytest.mark.parametrize(
    ("given", "place", "said"),
    [
        ({"prompt": 5}, "prompt", "valid string"),
        ({"prompt": ["a", 5]}, "prompt.1", "valid string"),
        ({"prompt": [5, -1]}, "prompt.1", "greater than or equal to 0"),
        ({"prompt": [[1, 2], [-1]]}, "prompt.1.0", "greater than or equal to 0"),
        ({"stop": [1]}, "stop.0", "valid string"),
        ({"max_token": 1}, "max_token", "no such field; did you mean 'max_tokens'?"),
    ],
)
def test_a_client_is_told_where_its_mistake_is(
    given: dict[str, Any], place: str, said: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        CompletionRequest.model_validate({"model": "acme", "prompt": "x", **given})
    # As FastAPI hands them on.
    errors = [{**error, "loc": ("body", *error["loc"])} for error in refused.value.errors()]
    told = failure_of(RequestValidationError(errors)).body["error"]
    assert told["param"] == place
    assert told["message"].startswith(f"{place}: ")
    assert said in told["message"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            {"type": "json_invalid", "loc": ("body", 9), "ctx": {"error": "Expecting value"}},
            "the body is no JSON: Expecting value, at character 9",
        ),
        (
            {"type": "model_attributes_type", "loc": ("body",)},
            "the body must be a JSON object; send it with Content-Type: application/json",
        ),
    ],
)
def test_a_body_that_is_no_request_names_no_field(error: dict[str, Any], said: str) -> None:
    told = failure_of(RequestValidationError([{"msg": "", "input": None, **error}])).body["error"]
    assert (told["message"], told["param"]) == (said, None)
