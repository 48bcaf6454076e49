"""What a request may ask for: bounds of numbers, sizes and headers, and of the forms of answers."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx
import pytest

from support.server import RunningServer, raw_request, status_of

PROMPT = {"prompt": "abc", "max_tokens": 4, "ignore_eos": True}
JSON = {"content-type": "application/json"}

BAD_FIELDS: list[str] = [
    '"n": 0',
    '"n": 129',
    '"n": 1e9',
    '"n": true',
    '"best_of": 5',
    '"temperature": -0.1',
    '"temperature": 101',
    '"temperature": NaN',
    '"temperature": Infinity',
    '"temperature": 1e999',
    '"top_p": 0',
    '"top_p": 1.1',
    '"top_k": -2',
    '"min_p": 2',
    '"logprobs": 21',
    '"logprobs": -1',
    '"prompt_logprobs": 21',
    '"max_tokens": -1',
    '"max_tokens": 99999999999999999999',
    '"min_tokens": 2147483648',
    '"seed": 18446744073709551616',
    f'"seed": {"9" * 5000}',
    '"stop": ""',
    f'"stop": "{"x" * 257}"',
    '"stop": ["a","b","c","d","e","f","g","h","i","j","k","l","m","n","o","p","q"]',
    '"stop": ["\\ud800"]',
    f'"stop_token_ids": {list(range(65))}',
    '"stop_token_ids": [999]',
    '"stop_token_ids": [-1]',
    '"logit_bias": {"999": 1}',
    '"logit_bias": {"-1": 1}',
    '"logit_bias": {"x": 1}',
    '"logit_bias": {"1": 101}',
    '"logit_bias": {"1": null}',
    '"logit_bias": {"1": 1e999}',
    '"presence_penalty": 2.1',
    '"frequency_penalty": -2.1',
    '"repetition_penalty": 0',
    '"allowed_token_ids": []',
    '"allowed_token_ids": [999]',
    '"bad_words": [""]',
    '"bad_words": 7',
    '"priority": 1001',
    f'"cache_salt": "{"x" * 257}"',
    '"response_format": {"type": "xml"}',
    '"stream": "yes"',
    '"stream_options": 7',
    '"stop": [7]',
    '"prompt": {}',
    '"prompt": [-1]',
    '"prompt": [999]',
    '"prompt": [1.5]',
    '"prompt": [[]]',
    '"prompt": ""',
    f'"prompt": {[1] * 200}',
    f'"prompt": {[[1]] * 257}',
]


@pytest.mark.parametrize("field", BAD_FIELDS, ids=lambda field: field[:30])
def test_what_is_out_of_bounds_gets_400_and_is_not_queued(tiny_server: RunningServer, field: str):
    opened = len(tiny_server.observer.watches)
    body = "{" + ("" if '"prompt":' in field else '"prompt": "abc", ') + field + "}"
    answer = httpx.post(f"{tiny_server.url}/v1/completions", content=body.encode(), headers=JSON)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert len(tiny_server.observer.watches) == opened
    assert tiny_server.context.open == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"prompt": "x",}',
        b"[" * 4000,
        b'{"prompt":' * 400,
        b'"x"',
        b"1" * 4000,
    ],
    ids=lambda body: repr(body[:12]),
)
def test_a_body_that_is_no_request_gets_400(tiny_server: RunningServer, body: bytes):
    answer = httpx.post(f"{tiny_server.url}/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400, answer.text


def test_a_request_has_at_most_256_prompts(demo_server: RunningServer):
    answer = httpx.post(f"{demo_server.url}/v1/completions", json={"prompt": [[1]] * 257, "max_tokens": 1})
    assert answer.status_code == 400
    assert "256" in answer.json()["error"]["message"]


def test_a_hundred_thousand_brackets_get_400(demo_server: RunningServer):
    for body in (b"[" * 100_000, b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"):
        answer = httpx.post(f"{demo_server.url}/v1/chat/completions", content=body, headers=JSON)
        assert answer.status_code == 400


def test_a_body_over_the_limit_gets_413_announced_or_not(tiny_server: RunningServer):
    url, body = f"{tiny_server.url}/v1/completions", b'{"prompt": "' + b"a" * 20000 + b'"}'
    assert httpx.post(url, content=body, headers=JSON).status_code == 413
    answer = httpx.post(url, content=iter([body[:9000], body[9000:]]), headers=JSON)
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_an_announced_body_is_refused_before_it_is_sent(tiny_server: RunningServer):
    head = "POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 300000000\n"
    assert status_of(raw_request(tiny_server, head)) == 413


def test_headers_have_limits(tiny_server: RunningServer):
    url = f"{tiny_server.url}/version"
    assert httpx.get(url, headers={f"x-{place}": "1" for place in range(30)}).status_code == 200
    assert httpx.get(url, headers={f"x-{place}": "1" for place in range(50)}).status_code == 431
    assert httpx.get(url, headers={"x-long": "y" * 8192}).status_code in (400, 431)
    assert httpx.get(url, params={"q": "y" * 8192}).status_code in (400, 431)


@pytest.mark.parametrize(
    "lines",
    [
        "Content-Length: 4\nTransfer-Encoding: chunked\n",
        "Transfer-Encoding: chunked\nContent-Length: 4\n",
        "Content-Length: 4\nContent-Length: 5\n",
        "Content-Length: -1\n",
        "Content-Length: 4 \x0b4\n",
        "Transfer-Encoding: gzip\n",
    ],
)
def test_a_body_of_two_lengths_is_refused(tiny_server: RunningServer, lines: str):
    head = f"POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\n{lines}"
    answer = raw_request(tiny_server, head, b"0\r\n\r\n")
    assert 400 <= status_of(answer) < 502
    assert status_of(answer) != 413
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("given", ["ok-1.2:3/4", "bad id", "x" * 129, "\x7f", "é"])
def test_a_request_id_is_echoed_only_if_it_is_sane(tiny_server: RunningServer, given: str):
    answer = httpx.get(f"{tiny_server.url}/version", headers=[(b"x-request-id", given.encode("latin-1"))])
    echoed = answer.headers.get("x-request-id")
    assert (echoed == given) == (given == "ok-1.2:3/4")


def test_more_requests_than_may_be_open_get_429(tiny_server: RunningServer):
    tiny_server.context.open = 6
    try:
        answer = httpx.post(f"{tiny_server.url}/v1/completions", json=PROMPT)
    finally:
        tiny_server.context.open = 0
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    answer = httpx.post(f"{tiny_server.url}/v1/completions", json={**PROMPT, "prompt": ["a"] * 7})
    assert answer.status_code == 400
    assert tiny_server.context.open == 0


def test_each_answer_to_a_prompt_counts_as_open(tiny_server: RunningServer):
    answer = httpx.post(f"{tiny_server.url}/v1/completions", json={**PROMPT, "prompt": ["a"] * 2, "n": 4})
    assert answer.status_code == 400
    assert "6 answers" in answer.json()["error"]["message"]
    tiny_server.context.open = 4
    try:
        answer = httpx.post(f"{tiny_server.url}/v1/completions", json={**PROMPT, "n": 3})
    finally:
        tiny_server.context.open = 0
    assert answer.status_code == 429
    assert tiny_server.context.open == 0


MANY = [[]] * 60_000
LARGE_CHATS: dict[str, dict[str, Any]] = {
    "documents": {"chat_template_kwargs": {"documents": MANY}},
    "keys": {"chat_template_kwargs": {"documents": {str(number): 0 for number in range(30_000)}}},
    "tool": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"enum": MANY}}}]},
    "messages": {"messages": [{"role": "user", "content": "", "name": "a", "b": 1}] * 8_000},
    "arguments": {
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": json.dumps({"a": MANY})}}],
            },
        ]
    },
}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/v1/responses"])
@pytest.mark.parametrize("what", LARGE_CHATS)
def test_a_chat_of_more_values_than_a_template_can_read_gets_400(demo_server: RunningServer, path: str, what: str):
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], **LARGE_CHATS[what]}
    if path == "/v1/responses":
        body["input"] = body.pop("messages")
        if what in ("arguments", "messages"):
            pytest.skip("the items of a response bring a role and a text, and there are not so many")
        if what == "tool":
            body["tools"] = [{"type": "function", "name": "f", "parameters": {"enum": MANY}}]
    answer = httpx.post(f"{demo_server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 400, answer.text[:200]
    assert "more than 50000 texts, numbers, lists and objects" in answer.json()["error"]["message"]


def test_a_server_that_drains_takes_nothing_new_and_says_so(tiny_server: RunningServer):
    tiny_server.context.draining = True
    try:
        answer = httpx.post(f"{tiny_server.url}/v1/completions", json=PROMPT)
        ready, health = (httpx.get(f"{tiny_server.url}/{path}").status_code for path in ("ready", "health"))
    finally:
        tiny_server.context.draining = False
    assert answer.status_code == 503
    assert "retry-after" in answer.headers
    assert (ready, health) == (503, 200)


# ------------------------------------------------- 3, 6, 7, 8: what is in it

BAD_FORMS: list[dict[str, Any]] = [
    {"regex": "(" * 50},
    {"regex": "(?=a)b"},
    {"json_schema": {"type": "object", "properties": {"a": {"pattern": "("}}}},
    {"json_schema": {"$ref": "#/nowhere"}},
    {"choice": ["x"] * 5000},
    {"choice": []},
    {"grammar": "start: start start start start"},
    {"grammar": "nonsense"},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
]


def test_bad_forms_get_400_and_the_engine_goes_on(demo_server: RunningServer):
    nested: dict[str, Any] = {"type": "object"}
    for _ in range(60):
        nested = {"type": "object", "properties": {"a": nested}, "anyOf": [nested]}
        if len(json.dumps(nested)) > 200_000:
            break
    for form in [*BAD_FORMS, {"json_schema": nested}]:
        answer = httpx.post(f"{demo_server.url}/v1/completions", json={"prompt": "x", **form}, timeout=60)
        assert answer.status_code == 400, (form, answer.text)
        assert "/" not in answer.json()["error"]["message"].replace("/nowhere", ""), answer.text
    assert httpx.post(f"{demo_server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_bad_requests_do_not_harm_the_one_that_runs(tiny_server: RunningServer):
    body = {"prompt": "abc", "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    alone = httpx.post(f"{tiny_server.url}/v1/completions", json=body).json()["choices"][0]["text"]

    async def together() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=tiny_server.url) as client:
            bad = [client.post("/v1/completions", json={**PROMPT, "prompt": [999]}) for _ in range(20)]
            return list(await asyncio.gather(client.post("/v1/completions", json=body), *bad))

    good, *refused = asyncio.run(together())
    assert good.json()["choices"][0]["text"] == alone
    assert {answer.status_code for answer in refused} == {400}


def test_special_tokens_in_a_users_text_are_text(demo_server: RunningServer):
    def chat(content: str) -> list[int]:
        body = {"messages": [{"role": "user", "content": content}]}
        return httpx.post(f"{demo_server.url}/tokenize", json=body).json()["tokens"]

    end = httpx.post(f"{demo_server.url}/tokenize", json={"prompt": "<|im_end|>"}).json()["tokens"]
    assert len(end) == 1
    assert chat("hi <|im_end|>").count(end[0]) == chat("hi").count(end[0])


def test_no_address_is_fetched_for_a_client(demo_server: RunningServer):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "what is it?"}]
        answer = httpx.post(
            f"{demo_server.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]}
        )
        assert answer.status_code == 400
        assert "only text" in answer.json()["error"]["message"]
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_what_is_said_of_a_field_of_several_kinds_is_of_the_kind_that_was_given(tiny_server: RunningServer):
    def said(stop: object) -> str:
        answer = httpx.post(f"{tiny_server.url}/v1/completions", json={"prompt": "a", "stop": stop})
        assert answer.status_code == 400
        return answer.json()["error"]["message"]

    assert "at most 16 items" in said(["x"] * 17)
    assert "valid string" in said(5)
    assert said([5]).startswith("stop")
