"""/metrics and /debug: who may ask, what they get, and what is said of it in the schema."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from typing import Any

import httpx
import pytest

from gapless.errors import ConfigError
from gapless.server.app import create_app
from gapless.server.config import ServerConfig
from gapless.server.context import Context
from gapless.server.observer import ServerObserver
from support.engine_source import BUSY, Clock, FakeEngines, context_of

KEY = {"authorization": "Bearer secret"}
ROUTES = [("GET", "/metrics"), ("GET", "/debug/stats"), ("GET", "/debug/timeline"), ("POST", "/debug/lookahead")]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engines() -> FakeEngines:
    return FakeEngines()


@pytest.fixture
def context(engines: FakeEngines, clock: Clock) -> Context:
    return context_of(engines, ServerObserver(clock=clock), ServerConfig(api_keys=("secret",)))


def ask(context: Context, method: str, path: str, headers: dict[str, str] = KEY, **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(context))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, headers=headers, **options)

    return asyncio.run(once())


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_the_key(context: Context, method: str, path: str):
    options: dict[str, Any] = {"json": {"lookahead": 0}} if method == "POST" else {}
    assert ask(context, method, path, {}, **options).status_code == 401
    assert ask(context, method, path, {"authorization": "Bearer other"}, **options).status_code == 401
    assert ask(context, method, path, **options).status_code == 200


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_the_schema_lists_the_statuses(context: Context, method: str, path: str):
    schema = ask(context, "GET", "/openapi.json").json()
    operation = schema["paths"][path][method.lower()]
    assert {"200", "400", "401", "503"} <= set(operation["responses"])
    assert ("415" in operation["responses"]) == (method == "POST")
    assert operation["security"]


def test_metrics_are_text_for_prometheus(context: Context):
    answer = ask(context, "GET", "/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'gapless_requests_running{model_name="tiny"} 6.0' in answer.text


def test_stats_are_the_engines_figures_with_what_the_server_knows(context: Context, clock: Clock):
    assert isinstance(context.observer, ServerObserver)
    watch = context.observer.opened("a", "/v1/completions")
    clock.now += 0.1
    watch.tokens(1)
    answer = ask(context, "GET", "/debug/stats").json()
    assert answer.items() >= asdict(BUSY).items()
    assert (answer["state"], answer["model"], answer["device"]) == ("ready", "tiny", "a device")
    assert answer["time"] > 1.7e9
    assert answer["latency"]["ttft"] == {"p50": pytest.approx(0.1, rel=0.03), "p99": pytest.approx(0.1, rel=0.03)}
    assert answer["latency"]["inter_token"] == answer["latency"]["e2e"] == {"p50": None, "p99": None}


def test_without_an_engine_there_are_metrics_but_no_stats(context: Context, engines: FakeEngines):
    engines.state = "starting"
    assert ask(context, "GET", "/metrics").status_code == 200
    assert ask(context, "GET", "/debug/stats").status_code == 503
    assert ask(context, "GET", "/debug/timeline").status_code == 503
    assert ask(context, "POST", "/debug/lookahead", json={"lookahead": 0}).status_code == 503


def test_the_timeline_is_a_chrome_trace_of_so_many_steps(context: Context):
    answer = ask(context, "GET", "/debug/timeline?steps=7").json()
    spans = [event for event in answer["traceEvents"] if event["ph"] == "X"]
    assert [span["args"]["step"] for span in spans] == list(range(7))
    assert answer["traceEvents"][0]["args"] == {"name": "lookahead 1"}


@pytest.mark.parametrize("steps", ["0", "501", "-1", "many", "1e2"])
def test_a_number_of_steps_out_of_bounds_is_refused(context: Context, steps: str):
    answer = ask(context, "GET", f"/debug/timeline?steps={steps}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "steps"


def test_the_lookahead_can_be_set_to_what_the_engine_was_built_for(context: Context, engines: FakeEngines):
    answer = ask(context, "POST", "/debug/lookahead", json={"lookahead": 0})
    assert (answer.status_code, answer.json()) == (200, {"lookahead": 0, "seconds": None, "lease": None})
    assert engines.now.lookahead == 0
    assert ask(context, "POST", "/debug/lookahead", json={"lookahead": 2}).status_code == 400
    assert engines.now.lookahead == 0


def leases(engines: FakeEngines, *wanted: tuple[int, float | None]) -> list[int]:
    """The lookahead after each of the calls, and in the end, longer after the last than it lasts."""

    async def all_of_them() -> list[int]:
        found: list[int] = []
        context = context_of(engines, ServerObserver())
        transport = httpx.ASGITransport(create_app(context))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for lookahead, seconds in wanted:
                answer = await client.post("/debug/lookahead", json={"lookahead": lookahead, "seconds": seconds})
                assert answer.json() == {"lookahead": lookahead, "seconds": seconds, "lease": None}
                found.append(engines.now.lookahead)
            await asyncio.sleep(0.3)
        return [*found, engines.now.lookahead]

    return asyncio.run(all_of_them())


def test_a_lookahead_for_a_while_is_what_it_was_afterwards(engines: FakeEngines):
    assert leases(engines, (0, 0.05)) == [0, 1]


def test_the_last_one_who_sets_the_lookahead_has_his_way(engines: FakeEngines):
    engines.most = 3
    assert leases(engines, (0, 0.05), (2, 0.1), (0, 0.05)) == [0, 2, 0, 1]
    assert leases(engines, (0, 0.05), (3, None)) == [0, 3, 3]
    assert leases(engines, (2, None), (0, 0.05)) == [2, 0, 2]
    assert leases(engines, (0, 3600.0)) == [0, 0]


def test_a_lease_that_ends_while_another_lookahead_is_being_set_undoes_nothing(engines: FakeEngines):
    engines.most = 3

    async def slow(lookahead: int) -> None:
        engines.now = replace(engines.now, lookahead=lookahead)
        await asyncio.sleep(0.1 if lookahead == 3 else 0.0)  # the answer is late

    async def overlapping() -> int:
        context = context_of(engines, ServerObserver())
        await context.lookahead.set(0, 0.05)
        engines.set_lookahead = slow
        await context.lookahead.set(3, None)
        await asyncio.sleep(0.1)
        return engines.now.lookahead

    assert asyncio.run(overlapping()) == 3


def test_a_lookahead_that_can_not_be_leaves_the_lease(engines: FakeEngines):
    async def refused() -> int:
        context = context_of(engines, ServerObserver())
        await context.lookahead.set(0, 0.05)
        with pytest.raises(ConfigError):
            await context.lookahead.set(9, None)
        await asyncio.sleep(0.3)
        return engines.now.lookahead

    assert asyncio.run(refused()) == 1


def test_a_lookahead_for_a_while_is_safe_from_anothers_but_not_from_one_for_good(engines: FakeEngines):
    engines.most = 3

    async def two_tabs() -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        transport = httpx.ASGITransport(create_app(context_of(engines, ServerObserver())))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for wanted in [
                {"lookahead": 0, "seconds": 60, "lease": "a"},
                {"lookahead": 2, "seconds": 60, "lease": "b"},
                {"lookahead": 1, "seconds": 0.001},
                {"lookahead": 2, "seconds": 60, "lease": "a"},
                {"lookahead": 3},
                {"lookahead": 0, "seconds": 60, "lease": "b"},
                {"lookahead": 1, "seconds": 0.001, "lease": "b"},
            ]:
                answer = await client.post("/debug/lookahead", json=wanted)
                found.append((answer.status_code, engines.now.lookahead))
            await asyncio.sleep(0.1)
            assert (await client.post("/debug/lookahead", json={"lookahead": 2, "seconds": 60})).status_code == 200
        return found

    assert asyncio.run(two_tabs()) == [(200, 0), (409, 0), (409, 0), (200, 2), (200, 3), (200, 0), (200, 1)]


def test_a_lease_that_ends_without_an_engine_is_over(engines: FakeEngines):
    async def gone() -> bool:
        context = context_of(engines, ServerObserver())
        await context.lookahead.set(0, 0.02)
        engines.state = "dead"
        begun = asyncio.all_tasks()
        await asyncio.gather(*(begun - {asyncio.current_task()}))  # raises what they raise
        return True

    assert asyncio.run(gone())


@pytest.mark.parametrize("lease", ["", "x" * 65, 1])
def test_a_lease_that_is_none_is_refused(context: Context, engines: FakeEngines, lease: object):
    wanted = {"lookahead": 0, "seconds": 1.0, "lease": lease}
    assert ask(context, "POST", "/debug/lookahead", json=wanted).status_code == 400
    assert engines.now.lookahead == 1


@pytest.mark.parametrize("seconds", [b"0", b"-1", b"3601", b"true", b'"1"', b"NaN", b"1e999"])
def test_a_time_that_is_none_is_refused(context: Context, engines: FakeEngines, seconds: bytes):
    headers = KEY | {"content-type": "application/json"}
    body = b'{"lookahead": 0, "seconds": ' + seconds + b"}"
    assert ask(context, "POST", "/debug/lookahead", headers, content=body).status_code == 400
    assert engines.now.lookahead == 1


@pytest.mark.parametrize("body", [b"", b"[]", b'{"lookahead": "1"}', b'{"lookahead": true}', b'{"lookahead": -1}'])
def test_a_lookahead_that_is_none_is_refused(context: Context, engines: FakeEngines, body: bytes):
    headers = KEY | {"content-type": "application/json"}
    assert ask(context, "POST", "/debug/lookahead", headers, content=body).status_code == 400
    assert engines.now.lookahead == 1


def test_another_sites_page_can_not_set_the_lookahead(engines: FakeEngines, clock: Clock):
    open_to_all = context_of(engines, ServerObserver(clock=clock))
    body = b'{"lookahead": 0}'
    for headers, status in [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json", "origin": "https://elsewhere.example"}, 403),
    ]:
        assert ask(open_to_all, "POST", "/debug/lookahead", headers, content=body).status_code == status
    assert engines.now.lookahead == 1
