"""What every request passes first: its size, its headers, where it comes from. And what every answer carries."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections import deque
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gapless.server.config import ServerConfig
from gapless.server.context import Context
from gapless.server.http.errors import ApiError, error_of

LINGER_SECONDS = 2.0  # that the rest of a refused body is read for, so that its sender sees the answer
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:@/+=-]{1,128}")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_NO_STORE = (b"cache-control", b"no-store")


class Turnstile:
    """Lets one request begin at each turn of the event loop. Of a thousand that come at once each takes the loop for a
    moment; between two of them everybody else gets theirs."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def pass_through(self) -> None:
        """Returns when it is this one's turn."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            loop.call_soon(self._turn)
        await turn

    def _turn(self) -> None:
        turn = self._waiting.popleft()
        if not turn.done():  # else it was cancelled
            turn.set_result(None)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._turn)


class Gate:
    """An ASGI middleware in front of everything."""

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app = app
        self._context = context
        self._turnstile = Turnstile()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See class."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] not in _SAFE_METHODS:
            await self._turnstile.pass_through()
        request_id = _request_id(scope["headers"])
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["send"] = send  # for the parts of a body, which nobody between here and the route looks at
        answer = _Answer(scope, send, self._context, request_id)
        refusal = self._refusal(scope)
        if refusal is not None:
            await answer.refuse(refusal, receive)
            return
        try:
            await self._app(scope, _Counted(receive, self._context.config.max_body_bytes).receive, answer.send)
        except Exception as error:  # noqa: BLE001 - logged, and shown by its request's id alone
            shown = error_of(error, request_id)
            if not answer.started:
                await answer.refuse(shown, receive)

    def _refusal(self, scope: Scope) -> ApiError | None:
        config, headers = self._context.config, scope["headers"]
        size = (
            len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(name) + len(value) for name, value in headers)
        )
        if len(headers) > config.max_headers or size > config.max_header_bytes:
            return ApiError(
                431, f"a request has at most {config.max_headers} headers and {config.max_header_bytes} bytes in them"
            )
        lengths = _values(headers, b"content-length")
        if lengths and _values(headers, b"transfer-encoding"):
            return ApiError(400, "a request has Content-Length or Transfer-Encoding, not both")
        if any(not length.isdigit() or len(length) > 18 or int(length) > config.max_body_bytes for length in lengths):
            return _too_large(config.max_body_bytes)
        if scope["method"] not in _SAFE_METHODS and not _is_own(headers, config):
            return ApiError(403, "pages of other sites may not call this server: see --cors-origin")
        return None


class _Counted:
    """The body as it comes in, up to its limit."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._size = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size > self._limit:
                raise _too_large(self._limit)
        return message


class _Answer:
    """The answer as it goes out: with the headers that all have, and counted if it is a refusal."""

    def __init__(self, scope: Scope, send: Send, context: Context, request_id: str) -> None:
        self._scope = scope
        self._send = send
        self._context = context
        self._request_id = request_id
        self.started = False

    async def send(self, message: Message) -> None:
        if not self.started and message["type"] == "http.response.start":
            self.started = True
            self._begin(message)
        await self._send(message)

    async def refuse(self, error: ApiError, receive: Receive) -> None:
        """Answer, and read on a little so that the answer is not lost with the connection."""
        headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in error.headers.items()]
        headers += [(b"content-type", b"application/json"), (b"connection", b"close")]
        body = error.body()
        headers.append((b"content-length", str(len(body)).encode()))
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": True})
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while (await receive()).get("more_body"):
                    pass
        except TimeoutError:
            pass
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    def _begin(self, message: Message) -> None:
        headers: list[tuple[bytes, bytes]] = list(message.get("headers", ()))
        names = {name.lower() for name, _ in headers}
        headers += [each for each in (*_SECURITY, _NO_STORE) if each[0] not in names]
        headers.append((b"x-request-id", self._request_id.encode()))
        message["headers"] = headers
        if message["status"] >= 400 and not self._scope["state"].get("opened"):
            route = self._scope.get("route")
            path = str(getattr(route, "path", "")) or "other"
            self._context.observer.refused(self._request_id, path, message["status"])


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    given = _values(headers, b"x-request-id")
    return given[0].decode() if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) else uuid.uuid4().hex


def _values(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> list[bytes]:
    return [value for name, value in headers if name == wanted]


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"a request's body has at most {limit} bytes")


def _is_own(headers: Iterable[tuple[bytes, bytes]], config: ServerConfig) -> bool:
    """Whether no browser sent it, or the server's own page or one of cors_origins did.

    Where the server listens on loopback only, the page's host must be loopback, too: else a name that another site
    points to 127.0.0.1 would be the server's own.
    """
    origins = _values(headers, b"origin")
    if not origins:
        return True
    origin = origins[0].decode("latin-1")
    if origin in config.cors_origins or "*" in config.cors_origins:
        return True
    try:
        page = urlsplit(origin)
        name = page.hostname or ""
    except ValueError:
        return False
    if config.host in _LOOPBACK and name not in _LOOPBACK and not name.endswith(".localhost"):
        return False
    hosts = _values(headers, b"host")
    return bool(page.netloc) and len(hosts) == 1 and page.netloc.lower() == hosts[0].decode("latin-1").lower()
