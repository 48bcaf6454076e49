"""A crowd holds nobody else up: not by its number, and not by forms that take long to compile."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import pytest

from frontend.tiny import tiny_engine
from gapless.collector import Prepared
from gapless.loading import Loaded
from gapless.params import SamplingParams
from gapless.prompts import Prompt
from gapless.server.app import create_app
from gapless.server.context import THREADS
from gapless.server.http.limits import Turnstile
from support.server import RunningServer, running_server


def test_one_begins_at_a_turn_in_the_order_of_their_coming():
    async def scenario() -> tuple[list[int], list[int]]:
        turnstile, begun, seen = Turnstile(), list[int](), list[int]()

        async def one(number: int) -> None:
            await turnstile.pass_through()
            begun.append(number)

        tasks = [asyncio.create_task(one(number)) for number in range(50)]
        while len(begun) < 50:
            await asyncio.sleep(0)
            seen.append(len(begun))
        await asyncio.gather(*tasks)
        await one(50)  # after a pause, too
        return begun, seen

    begun, seen = asyncio.run(scenario())
    assert begun == list(range(51))
    assert all(after - before <= 1 for before, after in pairwise(seen))


def test_who_leaves_while_waiting_holds_nobody_up():
    async def scenario() -> list[int]:
        turnstile, begun = Turnstile(), list[int]()

        async def one(number: int) -> None:
            await turnstile.pass_through()
            begun.append(number)

        tasks = [asyncio.create_task(one(number)) for number in range(6)]
        await asyncio.sleep(0)
        for number in (0, 3, 5):
            tasks[number].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(one(6), 5)
        return begun

    assert asyncio.run(scenario()) == [1, 2, 4, 6]


def test_health_does_not_wait_behind_a_crowd():
    """All come at the same turn, /health last; it is answered before most of them have begun."""

    async def crowd(server: RunningServer) -> tuple[int, int]:
        transport = httpx.ASGITransport(create_app(server.context))
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
            body = {"prompt": "abc", "max_tokens": 2}
            asked = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(200)]
            health = await client.get("/health")
            done = sum(each.done() for each in asked)
            answers = await asyncio.gather(*asked)
            assert {each.status_code for each in answers} == {200}
            return health.status_code, done

    with running_server(tiny_engine(lookahead=1), max_open=512) as server:
        status, done = server.run(lambda: crowd(server))
    assert status == 200
    assert done < 50


def test_forms_that_are_compiled_leave_threads_for_long_prompts(monkeypatch: pytest.MonkeyPatch):
    waiting, over = threading.Semaphore(0), threading.Event()
    prepare = Loaded.prepare

    def slowly(self: Loaded, prompt: Prompt, params: SamplingParams | None = None) -> Prepared:
        if params is not None and params.has_form:
            waiting.release()
            assert over.wait(60)
            params = None
        return prepare(self, prompt, params)

    monkeypatch.setattr(Loaded, "prepare", slowly)

    async def scenario(server: RunningServer) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
        transport = httpx.ASGITransport(create_app(server.context))
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
            hard = {"prompt": "abc", "max_tokens": 2, "regex": "a+"}
            asked = [asyncio.create_task(client.post("/v1/completions", json=hard)) for _ in range(3 * THREADS)]
            while not waiting.acquire(blocking=False):
                await asyncio.sleep(0.01)
            try:
                long = await asyncio.wait_for(
                    client.post("/v1/completions", json={"prompt": ["abc"] * 6, "max_tokens": 2}), 30
                )
            finally:
                over.set()
            assert long.status_code == 200
            assert {each.status_code for each in await asyncio.gather(*asked)} == {200}

    with running_server(tiny_engine(lookahead=1), max_open=512) as server:
        server.run(lambda: scenario(server))
