"""What clients may not do, and what they may not learn."""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.types import Message

from frontend.tiny import GatedModel, TripModel, tiny_engine
from gapless.server.app import create_app
from gapless.server.http import sse
from gapless.server.http.auth import is_public, needs_key
from support.server import RunningServer, raw_request, running_server, status_of
from support.waiting import eventually

KEYS = ("first-key", "second-key")
PROMPT = {"prompt": "abc", "max_tokens": 4, "ignore_eos": True}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def locked_server() -> Iterator[RunningServer]:
    """With keys, and one other origin that may call."""
    with running_server(tiny_engine(lookahead=1), api_keys=KEYS, cors_origins=("https://friend.example",)) as server:
        yield server


# ---------------------------------------------------------------- 4: the key


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 401),
        ({"authorization": "Bearer first-key"}, 200),
        ({"authorization": "bearer second-key"}, 200),
        ({"x-api-key": "second-key"}, 200),
        ({"authorization": "Bearer first-ke"}, 401),
        ({"authorization": "Bearer first-key2"}, 401),
        ({"authorization": "Basic first-key"}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": b"Bearer \xa0first-key"}, 401),
        ({"authorization": "Bearer \t first-key"}, 200),
        ({"x-api-key": "nöpe".encode()}, 401),
    ],
    ids=str,
)
def test_a_key_is_needed_and_any_of_them_does(locked_server: RunningServer, headers: dict[str, Any], expected: int):
    answer = httpx.get(f"{locked_server.url}/v1/models", headers=headers)
    assert answer.status_code == expected
    if expected == 401:
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_all_keys_are_compared_by_digest_whichever_is_right(
    locked_server: RunningServer, monkeypatch: pytest.MonkeyPatch
):
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in ("first-key", "second-key", "x" * 1000):
        compared.clear()
        httpx.get(f"{locked_server.url}/v1/models", headers={"x-api-key": key})
        assert len(compared) == len(KEYS)
        assert all(len(left) == len(right) == 32 for left, right in compared)


@pytest.mark.parametrize("host", ["/health", "health", "127.0.0.1/health?", "127.0.0.1:8000@x/health", ""])
def test_the_host_header_opens_nothing(locked_server: RunningServer, host: str):
    answer = raw_request(locked_server, f"GET /v1/models HTTP/1.1\nHost: {host}\nConnection: close\n")
    assert status_of(answer) in (400, 401)
    answer = raw_request(
        locked_server, "GET /v1/models HTTP/1.1\nHost: x\nX-Forwarded-Host: /health\nX-Original-URL: /health\n"
    )
    assert status_of(answer) == 401
    assert status_of(raw_request(locked_server, "GET http://x/health/../v1/models HTTP/1.1\nHost: x\n")) in (401, 404)


def test_a_page_that_may_call_may_send_the_headers_of_its_client(locked_server: RunningServer):
    asked = "authorization,content-type,x-stainless-arch,x-stainless-retry-count"
    headers = {"access-control-request-method": "POST", "access-control-request-headers": asked}
    for origin, status in (("https://friend.example", 200), ("https://other.example", 400)):
        answer = httpx.options(f"{locked_server.url}/v1/chat/completions", headers={"origin": origin, **headers})
        assert answer.status_code == status


def calls_of(dependant: Dependant) -> Iterator[object]:
    for each in dependant.dependencies:
        yield each.call
        yield from calls_of(each)


def test_every_route_says_whether_it_needs_the_key(locked_server: RunningServer):
    routes: list[APIRoute] = []
    public: set[str] = set()
    for route in create_app(locked_server.context).routes:
        assert isinstance(route, APIRoute), f"{route} can say nothing of a key"
        routes.append(route)
        declared = {call for call in calls_of(route.dependant) if call in (needs_key, is_public)}
        assert len(declared) == 1, f"{route.path} does not say whether it needs the key"
        if is_public in declared:
            public.add(route.path)
    assert {"/health", "/ready", "/version"} <= public
    assert all(not path.startswith(("/v1", "/debug", "/metrics", "/tokenize", "/detokenize")) for path in public)
    for route in routes:
        if route.path not in public:
            for method in route.methods or ():
                path = route.path.replace("{name:path}", "x")
                assert httpx.request(method, f"{locked_server.url}{path}").status_code == 401, path


def test_the_key_is_asked_for_before_the_body_is_looked_at(locked_server: RunningServer):
    answer = httpx.post(f"{locked_server.url}/v1/completions", content=b"no JSON", headers=JSON)
    assert answer.status_code == 401


# ------------------------------------------------------ 9: the prefix cache


def test_tenants_with_different_keys_or_salts_share_no_cache(locked_server: RunningServer):
    def cached(key: str, salt: str | None = None) -> int:
        answer = httpx.post(
            f"{locked_server.url}/v1/completions",
            json={"prompt": "a shared secret beginning", "max_tokens": 1, "cache_salt": salt},
            headers={"x-api-key": key},
        )
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("first-key") == 0
    assert cached("first-key") > 0
    assert cached("second-key") == 0
    assert cached("first-key", "mine") == 0
    assert cached("first-key", "mine") > 0
    assert cached("second-key", "mine") == 0


# --------------------------------------------------------- 11: disconnecting


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(demo_server: RunningServer, stream: bool):
    engine, seen = demo_server.engine, demo_server.observer
    eventually(lambda: engine.held_blocks == 0)
    body = json.dumps({"prompt": ["x", "y"], "max_tokens": 8000, "ignore_eos": True, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {len(body)}\n"
    with socket.create_connection(("127.0.0.1", demo_server.port)) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
        if stream:
            assert b"200 OK" in connection.recv(4096)
        eventually(lambda: engine.held_blocks > 0)
    eventually(lambda: engine.held_blocks == 0)
    eventually(lambda: demo_server.context.open == 0)
    ((reason, usage),) = seen.watches[-1].ends
    assert reason == "cancelled"
    assert usage is not None
    assert usage.prompt_tokens > 0  # though nothing had been read of a whole answer
    assert usage.completion_tokens < 1000


@pytest.mark.parametrize("stream", [True, False])
def test_no_step_is_begun_for_a_client_that_has_left(stream: bool):
    model = GatedModel()
    with running_server(tiny_engine(model, lookahead=1)) as server:
        model.gated = True
        body = json.dumps({"prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {len(body)}\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
            model.gate.release(8)
            eventually(lambda: model.begun == 9)
        eventually(lambda: server.context.open == 0)
        model.gate.release(1000)
        eventually(lambda: server.engine.held_blocks == 0)
        assert model.begun <= 10  # the one that ran, and the one that was queued behind it


async def read_stream(server: RunningServer, taken: Callable[[], Awaitable[None]]) -> list[bytes]:
    """The parts of a long answer, each of which the client takes when `taken` is over."""
    body = json.dumps({"prompt": "abc", "max_tokens": 100, "ignore_eos": True, "stream": True}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    parts: list[bytes] = []

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            parts.append(message["body"])
            await taken()

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"x")],
    }
    await create_app(server.context)(scope, receive, send)
    return parts


def test_a_slow_reader_gets_longer_deltas_and_holds_nobody():
    """Its first part is not taken before the engine has nothing left to do."""
    with running_server(tiny_engine(lookahead=1)) as server:
        done: list[float] = []

        async def engine_is_idle() -> None:
            while server.engine.held_blocks:
                await asyncio.sleep(0.001)
            if not done:
                await asyncio.sleep(0.1)  # the last record is on its way
                done.append(time.monotonic())
                await asyncio.sleep(0.1)

        parts = server.run(lambda: read_stream(server, engine_is_idle))
    assert len(parts) < 10  # not one for each of the hundred tokens
    (watch,) = server.observer.watches
    assert watch.count == 100
    assert max(each.last for each in watch.heard) <= done[0]  # the pauses are the reader's, not the tokens'
    assert parts[-1].endswith(b"data: [DONE]\n\n")


def test_who_reads_nothing_is_let_go_and_who_reads_just_in_time_is_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sse, "PATIENCE_SECONDS", 0.5)
    with running_server(tiny_engine(lookahead=1)) as server:
        parts = server.run(lambda: read_stream(server, lambda: asyncio.sleep(0.3)))
        assert parts[-1].endswith(b"data: [DONE]\n\n")
        assert len(parts) >= 3  # so the limit is over before the end
        begin = time.monotonic()
        parts = server.run(lambda: read_stream(server, lambda: asyncio.sleep(3600)))
        assert 0.5 <= time.monotonic() - begin < 30
        assert b"[DONE]" not in b"".join(parts)
        eventually(lambda: server.engine.held_blocks == 0 and server.context.open == 0)


# ------------------------------------------------------- 12: what is not said


def test_an_engine_that_dies_ends_requests_with_503_and_tells_nothing_of_it():
    model = TripModel()
    with running_server(tiny_engine(model, lookahead=1)) as server:
        model.steps_left = 5
        whole = httpx.post(f"{server.url}/v1/completions", json={**PROMPT, "max_tokens": 50})
        stream = httpx.post(f"{server.url}/v1/completions", json={**PROMPT, "stream": True})
        assert whole.status_code == 503
        assert 0 < server.observer.watches[0].count < 5  # which came before, though nobody got them
        assert stream.status_code == 503
        assert "tripped" not in whole.text + stream.text
        server.engine.state = "dead"
        assert httpx.get(f"{server.url}/health").status_code == 503


def test_an_engine_that_dies_in_a_stream_is_told_in_it():
    model = TripModel()
    with running_server(tiny_engine(model, lookahead=1)) as server:
        model.steps_left = 20
        answer = httpx.post(
            f"{server.url}/v1/completions", json={"prompt": "abc", "max_tokens": 60, "ignore_eos": True, "stream": True}
        )
        events = answer.text.split("\n\n")
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert events[-2:] == ["data: [DONE]", ""]
        assert "tripped" not in answer.text
        assert [reason for reason, _ in server.observer.watches[-1].ends] == ["error"]


def test_an_engine_that_stalls_is_not_healthy(tiny_server: RunningServer):
    tiny_server.engine.stalled_seconds = 1e6
    try:
        answer = httpx.get(f"{tiny_server.url}/health")
    finally:
        tiny_server.engine.stalled_seconds = None
    assert (answer.status_code, answer.json()["status"]) == (503, "stalled")


def test_a_defect_is_shown_by_its_requests_id_alone(tiny_server: RunningServer, caplog: pytest.LogCaptureFixture):
    secret = "/home/someone/model.py at 0x7f0000"
    tiny_server.engine.defect = RuntimeError(secret)
    try:
        answer = httpx.post(f"{tiny_server.url}/v1/completions", json=PROMPT, headers={"x-request-id": "find-me"})
    finally:
        tiny_server.engine.defect = None
    assert answer.status_code == 500
    assert "find-me" in answer.json()["error"]["message"]
    assert "someone" not in answer.text
    assert "0x7f" not in answer.text
    assert "find-me" in caplog.text


@pytest.mark.parametrize("path", ["/version", "/nothing", "/v1/completions", "/openapi.json"])
def test_all_answers_carry_the_security_headers(tiny_server: RunningServer, path: str):
    headers = httpx.get(f"{tiny_server.url}{path}").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert headers["x-request-id"]
    assert "server" not in headers


def test_no_page_loads_scripts_from_elsewhere(tiny_server: RunningServer):
    for path in ("/docs", "/redoc"):
        assert httpx.get(f"{tiny_server.url}{path}").status_code == 404


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "text/json", "xapplication/json"],
)
def test_what_a_form_of_another_site_can_send_gets_415(tiny_server: RunningServer, kind: str | None):
    headers = {} if kind is None else {"content-type": kind}
    body = json.dumps(PROMPT).encode()
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/debug/lookahead"):
        answer = httpx.post(f"{tiny_server.url}{path}", content=body, headers=headers)
        assert answer.status_code == 415, path


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("https://evil.example", 403),
        ("null", 403),
        ("http://127.0.0.1", 403),
        ("http://127.0.0.1:1", 403),
        ("http://[", 403),
        ("https://friend.example", 200),
        ("own", 200),
        (None, 200),
    ],
)
def test_pages_of_other_sites_may_not_call(locked_server: RunningServer, origin: str | None, expected: int):
    headers = {"x-api-key": KEYS[0]}
    if origin is not None:
        headers["origin"] = locked_server.url if origin == "own" else origin
    answer = httpx.post(f"{locked_server.url}/v1/completions", json=PROMPT, headers=headers)
    assert answer.status_code == expected
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == ("https://friend.example" if origin == "https://friend.example" else None)


def test_a_name_that_was_pointed_at_loopback_is_not_the_servers_own(locked_server: RunningServer):
    headers = {"x-api-key": KEYS[0], "origin": "http://rebound.example:80", "host": "rebound.example:80"}
    assert httpx.post(f"{locked_server.url}/v1/completions", json=PROMPT, headers=headers).status_code == 403


def test_a_preflight_is_answered_for_known_origins_only(locked_server: RunningServer):
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,authorization"}
    url = f"{locked_server.url}/v1/completions"
    known = httpx.options(url, headers={**ask, "origin": "https://friend.example"})
    assert known.headers["access-control-allow-origin"] == "https://friend.example"
    other = httpx.options(url, headers={**ask, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
