"""One request begins at a turn of the event loop, so that a crowd holds nobody else up."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import httpx

from frontend.tiny import tiny_engine
from gapless.server.app import create_app
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
