"""What a client gets whose answer is on its way when the server ends."""

from __future__ import annotations

import asyncio
import socket

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from gapless.config import EngineConfig
from gapless.server.context import UnavailableError
from gapless.server.run import _Http  # pyright: ignore[reportPrivateUsage]
from gapless.server.supervisor import Supervisor, start_message

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("seconds", "forced"),
    [(0.3, False), (3600.0, True)],  # uvicorn itself gives everybody 0.1 s
    ids=["it leaves", "forced, nobody waits for it"],
)
def test_an_answer_that_is_on_its_way_when_the_server_stops(seconds: float, forced: bool):
    async def serve(listener: socket.socket) -> None:
        asked = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            asked.set()
            await asyncio.sleep(seconds)
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
            await send({"type": "http.response.body", "body": b"last"})

        http = _Http(uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_config=None))
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        await asked.wait()
        http.force_exit = forced
        http.stop()
        await asyncio.wait_for(serving, 20)

    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        client.sendall(REQUEST)
        listener.setblocking(False)
        asyncio.run(serve(listener))
        client.settimeout(5)
        found = b""
        while part := client.recv(4096):
            found += part
    assert found.endswith(b"\r\n\r\nlast") == (not forced)


def test_who_comes_while_the_engine_is_ended_is_not_told_that_it_died():
    start = start_message("none", EngineConfig(), load="auto", shape=None, tokenizer=None, timeline=0)

    async def main() -> None:
        supervisor = Supervisor(start)
        await supervisor.close()
        with pytest.raises(UnavailableError, match="shutting down"):
            _ = supervisor.llm
        with pytest.raises(UnavailableError, match="shutting down"):
            await supervisor.stats()

    asyncio.run(main())
