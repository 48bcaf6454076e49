"""Server-sent events as a bare ASGI answer: what is ready goes out in one send, encoded once."""

from __future__ import annotations

import asyncio
from typing import Protocol, Self

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gapless.server.generation import Batch, Job
from gapless.server.http.errors import ApiError, error_of

PATIENCE_SECONDS = 60.0  # with a client that reads nothing, before it loses its place
DONE = b"data: [DONE]\n\n"
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
)


class Writer(Protocol):
    """Turns what comes into events, each `data: ...` and an empty line."""

    def write(self, batch: Batch) -> bytes:
        """Maybe none."""
        ...

    def end(self) -> bytes:
        """What comes after the last batch."""
        ...

    def fail(self, error: ApiError) -> bytes:
        """What comes in place of the end."""
        ...


class EventStream(Response):
    """A job's answer as it comes. A reader that is slow holds nobody: its events get longer."""

    def __init__(self, job: Job, writer: Writer, request_id: str) -> None:
        self._job = job
        self._writer = writer
        self._request_id = request_id
        self.background = None
        self.status_code = 200
        self.raw_headers = list(_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See class."""
        send_part: Send = scope["state"].get("send", send)
        job, writer = self._job, self._writer
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with job.watching(), asyncio.timeout(None) as limit:
                with _Patience(limit) as patience:
                    while (batch := await job.next()) is not None:
                        part = writer.write(batch)
                        if part:
                            patience.begin()
                            await send_part({"type": "http.response.body", "body": part, "more_body": True})
                            patience.end()
            last = writer.end()
        except TimeoutError:  # it does not read: nothing could be told
            return
        except Exception as error:  # noqa: BLE001 - the answer has begun: it can only be told in the stream
            last = writer.fail(error_of(error, self._request_id))
        finally:
            job.close()
        await send({"type": "http.response.body", "body": last, "more_body": False})


class _Patience:
    """Ends a stream whose client reads nothing. One timer for many parts: one for each would cost more than a part."""

    def __init__(self, limit: asyncio.Timeout) -> None:
        self._limit = limit
        self._clock = asyncio.get_running_loop().time
        self._begun: float | None = None

    def __enter__(self) -> Self:
        self._look()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def begin(self) -> None:
        """A part is being sent."""
        self._begun = self._clock()

    def end(self) -> None:
        """It was taken."""
        self._begun = None

    def _look(self) -> None:
        now = self._clock()
        left = PATIENCE_SECONDS - (0.0 if self._begun is None else now - self._begun)
        if left <= 0:
            self._limit.reschedule(now)
        else:
            self._timer = asyncio.get_running_loop().call_later(left, self._look)


def failure(error: ApiError) -> bytes:
    """An error in a stream of chunks, and its end."""
    return b"data: " + error.body() + b"\n\n" + DONE
