"""What a tool that makes up requests from /openapi.json has found, and what the schema has to say for it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from support.server import RunningServer

FIELDS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "abc", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 2},
    "/v1/responses": {"input": "abc", "max_output_tokens": 2},
}


@pytest.mark.parametrize("path", FIELDS)
@pytest.mark.parametrize(
    "field",
    [{"repetition_penalty": 5e-324}, {"repetition_penalty": 1e-40}, {"min_tokens": 2**31 - 1}],
    ids=str,
)
def test_a_number_that_is_none_in_32_bits_is_the_requests_fault(
    demo_server: RunningServer, path: str, field: dict[str, Any]
):
    body = {**FIELDS[path], "max_tokens": None, "max_output_tokens": None, **field}
    answer = httpx.post(f"{demo_server.url}{path}", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == next(iter(field))


@pytest.mark.parametrize("path", FIELDS)
def test_the_least_repetition_penalty_works(demo_server: RunningServer, path: str):
    answer = httpx.post(f"{demo_server.url}{path}", json={**FIELDS[path], "repetition_penalty": 0.01}, timeout=60)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/completions", {"prompt": ""}),
        ("/v1/completions", {"prompt": ["a", ""]}),
        ("/v1/completions", {"choice": [""]}),
        ("/v1/completions", {"choice": []}),
        ("/v1/completions", {"logit_bias": {"x": 1}}),
        ("/v1/chat/completions", {"messages": [{"role": "", "content": "a"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "a b", "content": "a"}]}),
        ("/v1/responses", {"input": [7]}),
        ("/v1/responses", {"tools": [{"type": "function", "name": ""}]}),
    ],
    ids=str,
)
def test_what_is_refused_is_no_request_by_the_schema_either(
    demo_server: RunningServer, path: str, field: dict[str, Any]
):
    schema = httpx.get(f"{demo_server.url}/openapi.json").json()
    reference = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = Draft202012Validator({**reference, "components": schema["components"]})
    assert validator.is_valid(FIELDS[path])
    assert not validator.is_valid({**FIELDS[path], **field})
    assert httpx.post(f"{demo_server.url}{path}", json={**FIELDS[path], **field}).status_code == 400


@pytest.mark.parametrize("path", FIELDS)
def test_the_schema_of_a_stream_is_that_of_its_events(demo_server: RunningServer, path: str):
    schema = httpx.get(f"{demo_server.url}/openapi.json").json()
    content = schema["paths"][path]["post"]["responses"]["200"]["content"]
    event = content["text/event-stream"]["schema"]
    assert event["type"] == "object"
    assert event["required"] == ["data"]
