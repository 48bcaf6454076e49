"""The clients of scripts/load.py: plain sockets, so that two thousand of them cost little next to the server."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import string
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

PATIENCE = 300.0  # seconds after which a request hangs
MARKER = 8  # letters
_SLOW_BUFFER = 4096
_JSON = "content-type: application/json"
_SHAPE = {"type": "object", "properties": {"code": {"type": "string", "maxLength": 12}}, "required": ["code"]}
BAD: tuple[tuple[str, int], ...] = (
    ("malformed", 400),
    ("out of bounds", 400),
    ("too long", 400),
    ("bad grammar", 400),
    ("unknown model", 404),
    ("wrong type", 415),
    ("oversize", 413),
    ("no key", 401),
)


@dataclass(frozen=True)
class Mix:
    """Shares of requests, the rest is read to its end."""

    bad: float = 0.1
    disconnects: float = 0.2
    cancels: float = 0.05
    slow: float = 0.05


@dataclass
class Plan:
    """One request, and what its client does with it.

    leave_tokens, leave_seconds  after which the client goes away
    expected                     the status, where it is known
    """

    kind: str
    path: str
    body: bytes
    marker: str
    header: str = _JSON
    key: bool = True
    stream: bool = False
    greedy: bool = False
    slow: bool = False
    leave_tokens: int | None = None
    leave_seconds: float | None = None
    expected: int | None = None


@dataclass
class Result:
    """How it went. reason: the last finish_reason. code: of an error, in the stream or in place of an answer."""

    plan: Plan
    begin: float
    end: float = 0.0
    status: int = 0
    reason: str = ""
    code: str = ""
    done: bool = False
    left: bool = False
    tokens: int = 0
    first: float | None = None
    text: str = ""
    trouble: str = ""


@dataclass
class Tally:
    """What all clients saw."""

    markers: set[str] = field(default_factory=set)
    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    left: int = 0
    tokens: int = 0
    greedy: int = 0
    repeated: int = 0
    told: int = 0
    firsts: list[float] = field(default_factory=list)
    lasts: list[float] = field(default_factory=list)
    refused: list[tuple[float, float, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Book it. What only a dead engine excuses goes to `refused`, with its begin and its end."""
        plan = result.plan
        self.kinds[plan.kind] += 1
        self.tokens += result.tokens
        self.left += result.left
        if result.first is not None and plan.stream:
            self.firsts.append(result.first - result.begin)
        self._look_for_markers(result)
        if result.trouble:
            self.failures.append(f"{plan.kind}: {result.trouble}")
        if result.left or result.trouble:
            return
        self.statuses[result.status] += 1
        if result.status == 503 or result.code in ("engine_dead", "unavailable"):
            self.told += result.status == 200
            self.refused.append((result.begin, result.end, f"{plan.kind}: {result.status} {result.code}"))
        elif result.status != (plan.expected or 200):
            self.failures.append(f"{plan.kind}: status {result.status} {result.code}, not {plan.expected or 200}")
        elif plan.expected is None:
            self._finish(result)

    def _finish(self, result: Result) -> None:
        if result.reason not in ("stop", "length") or not result.done:
            self.failures.append(f"{result.plan.kind}: it ended with {result.reason!r} {result.code}")
            return
        self.reasons[result.reason] += 1
        self.lasts.append(result.end - result.begin)
        if result.plan.greedy:
            self.greedy += 1
            self.repeated += result.plan.marker in result.text

    def _look_for_markers(self, result: Result) -> None:
        text, own = result.text, result.plan.marker
        for at in range(len(text) - MARKER + 1):
            found = text[at : at + MARKER]
            if found in self.markers and found != own:
                self.failures.append(f"{result.plan.kind}: the marker of another request, {found}, for {own}")


def make_plan(chance: random.Random, mix: Mix, markers: set[str], *, max_body: int) -> Plan:
    """A random request with a marker of its own."""
    marker = "".join(chance.choices(string.ascii_lowercase, k=MARKER))
    markers.add(marker)
    draw = chance.random()
    if draw < mix.bad:
        return _bad(chance, marker, max_body)
    plan, body = _good(chance, marker)
    draw -= mix.bad
    if draw < mix.disconnects:
        plan.kind, plan.stream = "disconnect", True
        if chance.random() < 0.5:
            plan.leave_tokens = chance.randrange(1, 12)
        else:
            plan.leave_seconds = chance.expovariate(0.3)
    elif draw < mix.disconnects + mix.cancels:
        plan.kind, plan.stream, plan.leave_seconds = "cancel", False, chance.expovariate(0.3)
    elif draw < mix.disconnects + mix.cancels + mix.slow:
        plan.kind, plan.stream, plan.slow = "slow reader", True, True
    body["stream"] = plan.stream
    plan.body = json.dumps(body).encode()
    return plan


def _good(chance: random.Random, marker: str) -> tuple[Plan, dict[str, Any]]:
    text = "\n".join([f"Code: {marker}"] * 5) + "\nCode:"
    body: dict[str, Any] = {"max_tokens": chance.choice((8, 16, 24, 32, 64)), "seed": chance.randrange(2**31)}
    plan = Plan("read", "/v1/completions", b"", marker, stream=chance.random() < 0.8)
    draw = chance.random()
    if draw < 0.25:
        plan.path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
        plan.greedy = draw < 0.7
        body["temperature"] = 0.0 if plan.greedy else 0.8
    if draw > 0.9:
        body |= {"n": 2, "logprobs": 3}
    elif draw > 0.85:
        body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "code", "schema": _SHAPE}}}
    elif draw > 0.8:
        body |= {"priority": -chance.randrange(3), "repetition_penalty": 1.05, "cache_salt": marker}
    elif draw > 0.75:
        body |= {"stop": [marker[:4]]}
    return plan, body


def _bad(chance: random.Random, marker: str, max_body: int) -> Plan:
    kind, status = chance.choice(BAD)
    body: dict[str, Any] = {"prompt": marker, "max_tokens": 8, "stream": True}
    if kind == "out of bounds":
        body["temperature"] = 1e9
    elif kind == "too long":
        body["prompt"] = [1] * 20_000
    elif kind == "bad grammar":
        body["regex"] = "(" * 20
    elif kind == "unknown model":
        body["model"] = marker
    data = json.dumps(body).encode()
    if kind == "malformed":
        data = data[:-1]
    elif kind == "oversize":
        data = b" " * (max_body + 1)
    header = "content-type: text/plain" if kind == "wrong type" else _JSON
    return Plan(f"bad: {kind}", "/v1/completions", data, marker, header=header, key=kind != "no key", expected=status)


class Client:
    """One after the other, over a connection that is kept if it may be."""

    def __init__(self, host: str, port: int, key: str) -> None:
        self._address = (host, port)
        self._key = key
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, plan: Plan) -> Result:
        """Do what the plan says."""
        result = Result(plan, time.monotonic())
        keep = False
        try:
            async with asyncio.timeout(plan.leave_seconds if plan.leave_seconds is not None else PATIENCE):
                keep = await self._ask(plan, result)
        except TimeoutError:
            result.left = plan.leave_seconds is not None
            result.trouble = "" if result.left else f"no end within {PATIENCE} s"
        except (OSError, EOFError, ValueError) as error:
            result.trouble = f"{type(error).__name__}: {error}"
        if not keep or plan.slow:
            self.close(abruptly=result.left and plan.marker[0] < "n")
        result.end = time.monotonic()
        return result

    def close(self, *, abruptly: bool = False) -> None:
        """Leave; abruptly: with a reset."""
        if self._streams is None:
            return
        _, writer = self._streams
        self._streams = None
        with suppress(OSError):
            if abruptly:
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _ask(self, plan: Plan, result: Result) -> bool:
        """Returns whether the connection may be used again."""
        if plan.slow:
            self.close()
        if self._streams is None:
            self._streams = await self._connect(slow=plan.slow)
        reader, writer = self._streams
        key = f"authorization: Bearer {self._key}\r\n" if plan.key and self._key else ""
        head = (
            f"POST {plan.path} HTTP/1.1\r\nhost: load\r\n{key}{plan.header}\r\ncontent-length: {len(plan.body)}\r\n\r\n"
        )
        writer.write(head.encode() + plan.body)
        with suppress(ConnectionError):  # it may answer and close before all is sent
            await writer.drain()
        result.status, headers = await _read_head(reader)
        if headers.get("transfer-encoding") != "chunked":
            _read_whole(result, await reader.readexactly(int(headers["content-length"])))
        elif headers["content-type"].startswith("text/event-stream"):
            await _read_events(result, _chunks(reader))
            if result.left:
                return False
        else:
            _read_whole(result, b"".join([part async for part in _chunks(reader)]))
        return headers.get("connection") != "close"

    async def _connect(self, *, slow: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = socket.socket()
        sock.setblocking(False)
        if slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BUFFER)
        await asyncio.get_running_loop().sock_connect(sock, self._address)
        return await asyncio.open_connection(sock=sock, limit=_SLOW_BUFFER if slow else 2**16)


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = [line.partition(":")[::2] for line in head[1:] if line]
    return int(head[0].split()[1]), {name.lower(): value.strip() for name, value in fields}


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readline(), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readline()


async def _read_events(result: Result, parts: AsyncIterator[bytes]) -> None:
    plan, rest = result.plan, b""
    async for part in parts:
        *events, rest = (rest + part).split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data: ")
            if data == b"[DONE]":
                result.done = True
            else:
                _read_choices(result, json.loads(data))
        if plan.leave_tokens is not None and result.tokens >= plan.leave_tokens:
            result.left = True
            return
        if plan.slow:
            await asyncio.sleep(0.3)
    if rest:
        result.trouble = "a stream ended within an event"


def _read_whole(result: Result, data: bytes) -> None:
    body = json.loads(data)
    if result.status >= 400 and not (isinstance(body.get("error"), dict) and body["error"].get("message")):
        result.trouble = f"status {result.status} without an error object"
    result.done = True
    _read_choices(result, body)
    result.tokens = body.get("usage", {}).get("completion_tokens", 0)


def _read_choices(result: Result, body: dict[str, Any]) -> None:
    """Of an answer, or of one of its events. Tokens of a stream are counted as events with a text."""
    if "error" in body:
        result.code = body["error"]["code"] or body["error"]["type"]
    for choice in body.get("choices", ()):
        inner = choice.get("delta") or choice.get("message") or choice
        text = inner.get("content") or inner.get("text") or ""
        if choice["index"] == 0:
            result.text += text
        if text:
            result.tokens += 1
            result.first = result.first or time.monotonic()
        result.reason = choice.get("finish_reason") or result.reason
