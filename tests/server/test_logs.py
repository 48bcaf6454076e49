"""The log: a line for each request and now and then one on how it goes; never a prompt, and nothing when idle."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import uvicorn

from gapless.outputs import Usage
from gapless.server import logs
from gapless.server.config import LogFormat, ServerConfig
from gapless.server.logs import ProgressLog, RequestLog, ServerLog
from gapless.server.observer import ServerObserver
from support.engine_source import BUSY, Clock, FakeEngines, context_of


@contextmanager
def logged(log_format: LogFormat) -> Generator[list[str]]:
    """The lines that are written in this block, once it has ended."""
    stream, lines = io.StringIO(), list[str]()
    with ServerLog(log_format, stream):
        yield lines
    lines += stream.getvalue().splitlines()


def one_request(observer: ServerObserver, clock: Clock, request_id: str = "req-1") -> None:
    watch = observer.opened(request_id, "/v1/completions")
    clock.now += 0.25
    watch.tokens(1)
    clock.now += 0.5
    watch.tokens(4)
    watch.ended("stop", Usage(12, 5, cached_tokens=8))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def observer(clock: Clock) -> ServerObserver:
    return ServerObserver([RequestLog()], clock=clock)


def test_a_request_has_one_line_of_text(observer: ServerObserver, clock: Clock):
    with logged("text") as lines:
        one_request(observer, clock)
        observer.refused("req-2", "/v1/completions", 429)
    assert len(lines) == 2
    assert lines[0].endswith(
        "Z INFO gapless.requests: req-1 /v1/completions stop, 12 + 5 tokens, first after 0.250 s, 0.750 s"
    )
    assert lines[1].endswith("Z INFO gapless.requests: req-2 /v1/completions refused with 429")


def test_a_request_has_one_line_of_json_with_all_its_figures(observer: ServerObserver, clock: Clock):
    with logged("json") as lines:
        one_request(observer, clock)
        observer.opened("req-2", "/v1/completions").ended("cancelled", None)
    first, second = (json.loads(line) for line in lines)
    assert first["time"].endswith("Z")
    del first["time"], first["message"]
    assert first == {
        "level": "info",
        "logger": "gapless.requests",
        "request_id": "req-1",
        "endpoint": "/v1/completions",
        "finish_reason": "stop",
        "prompt_tokens": 12,
        "cached_tokens": 8,
        "completion_tokens": 5,
        "ttft_seconds": 0.25,
        "seconds": 0.75,
    }
    assert (second["finish_reason"], second["prompt_tokens"], second["ttft_seconds"]) == ("cancelled", None, None)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_a_client_wrote_into_its_id_makes_no_line_of_its_own(
    observer: ServerObserver, clock: Clock, log_format: LogFormat
):
    with logged(log_format) as lines:
        one_request(observer, clock, "a\nb\x1b[2J\u2028c\r")
    (line,) = lines
    assert line.isprintable()
    assert "b" in line


def test_libraries_lines_go_the_same_way(observer: ServerObserver):
    uvicorn.Config(observer, log_config=None, access_log=False)  # pyright: ignore[reportArgumentType] - never called
    with logged("json") as lines:
        logging.getLogger("uvicorn.error").info("started on port %d", 8000)
        logging.getLogger("uvicorn.access").debug("GET /")
        logging.getLogger("a.library").info("so what")
        logging.getLogger("a.library").warning("take care")
        try:
            raise ValueError("broken")
        except ValueError:
            logging.getLogger("gapless.server").exception("a request failed")
    found = [json.loads(line) for line in lines]
    assert [line["message"] for line in found] == ["started on port 8000", "take care", "a request failed"]
    assert "ValueError: broken" in found[2]["traceback"]


def test_the_arguments_of_a_line_are_those_of_when_it_was_logged():
    state = ["before"]
    with logged("text") as lines:
        logging.getLogger("gapless.test").info("it was %s", state)
        state[0] = "after"
    assert lines[0].endswith("it was ['before']")


def test_the_root_logger_is_given_back():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with logged("text"):
        assert root.handlers != handlers
    assert (root.handlers, root.level) == (handlers, level)
    assert logging.getLogger("uvicorn").level == logging.NOTSET


class StuckStream(io.StringIO):
    """Takes nothing until it is let go. `done`: it has taken `last`."""

    def __init__(self, last: str = "") -> None:
        super().__init__()
        self.reached, self.let_go, self.done = threading.Event(), threading.Event(), threading.Event()
        self.last = last

    def write(self, text: str, /) -> int:
        self.reached.set()
        assert self.let_go.wait(60)
        if self.last in text:
            self.done.set()
        return super().write(text)


def test_a_reader_that_is_stuck_loses_lines_and_holds_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logs, "MAX_QUEUED", 10)
    stream, logger = StuckStream("line 9"), logging.getLogger("gapless.test")
    with ServerLog("text", stream):
        logger.info("first")
        assert stream.reached.wait(60)
        for number in range(100):
            logger.info("line %d", number)
        stream.let_go.set()
        assert stream.done.wait(60)
        logger.info("next")
        logger.info("last")
    lines = [line.split(": ", 1)[1] for line in stream.getvalue().splitlines()]
    assert lines == [
        "first",
        *(f"line {number}" for number in range(10)),
        "90 lines of the log were lost: its reader is too slow",
        "next",
        "last",
    ]


def test_a_reader_that_stays_stuck_does_not_hold_the_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logs, "MAX_QUEUED", 2)
    monkeypatch.setattr(logs, "STOP_SECONDS", 0.01)
    stream = StuckStream()
    with ServerLog("text", stream):
        for number in range(10):
            logging.getLogger("gapless.test").info("line %d", number)
    stream.let_go.set()


def progress(*ticks: Any) -> tuple[list[dict[str, Any]], FakeEngines]:
    """JSON lines of as many ticks, ten seconds apart; each is called before its own."""
    clock, engines = Clock(), FakeEngines(replace(BUSY, running=0, waiting=0))
    observer = ServerObserver(clock=clock)
    log = ProgressLog(context_of(engines, observer), observer)

    async def run() -> None:
        for before in ticks:
            clock.now += 10
            before(observer, engines)
            await log.tick()

    with logged("json") as lines:
        asyncio.run(run())
    return [json.loads(line) for line in lines], engines


def nothing(observer: ServerObserver, engines: FakeEngines) -> None:
    """Happens."""


def work(observer: ServerObserver, engines: FakeEngines) -> None:
    now = engines.now
    engines.now = replace(
        now,
        running=3,
        waiting=1,
        prompt_tokens=now.prompt_tokens + 200,
        generated_tokens=now.generated_tokens + 1000,
        active_seconds=now.active_seconds + 8,
        busy_seconds=now.busy_seconds + 6,
    )
    observer.opened("a", "/v1/completions").ended("stop", None)


def test_an_idle_server_logs_nothing_and_asks_the_engine_nothing():
    lines, engines = progress(nothing, nothing, nothing)
    assert lines == []
    assert engines.questions == 0


def test_a_line_says_how_it_goes():
    def first(observer: ServerObserver, engines: FakeEngines) -> None:
        observer.opened("a", "/v1/completions")

    lines, _ = progress(first, work)
    assert lines[1]["message"] == "3 running, 1 waiting, 20.0 prompt and 100.0 generated tokens/s, KV 25%, busy 75%"
    assert (
        lines[1].items()
        >= {
            "requests_running": 3,
            "requests_waiting": 1,
            "prompt_tokens_per_second": 20.0,
            "generation_tokens_per_second": 100.0,
            "kv_usage_ratio": 0.25,
            "gpu_busy_ratio": 0.75,
        }.items()
    )


def test_rates_after_a_rest_are_of_the_time_since_it():
    def rest(observer: ServerObserver, engines: FakeEngines) -> None:
        assert isinstance(observer.clock, Clock)
        observer.clock.now += 1000

    lines, _ = progress(work, rest, nothing, work)
    assert [line["generation_tokens_per_second"] for line in lines] == [130.0, 100.0]


def test_a_server_whose_requests_have_ended_has_a_last_line():
    def begin(observer: ServerObserver, engines: FakeEngines) -> None:
        watches.append(observer.opened("a", "/v1/completions"))

    def end(observer: ServerObserver, engines: FakeEngines) -> None:
        watches.pop().ended("stop", None)

    watches: list[Any] = []
    lines, _ = progress(nothing, begin, nothing, end, nothing, nothing)
    assert len(lines) == 3


def test_without_an_engine_a_line_says_so():
    def die(observer: ServerObserver, engines: FakeEngines) -> None:
        work(observer, engines)
        engines.state = "restarting"

    lines, _ = progress(work, die)
    assert lines[1]["message"].startswith("0 requests open, no figures")


def test_an_interval_of_nothing_is_no_progress_log():
    observer = ServerObserver()
    asyncio.run(ProgressLog(context_of(FakeEngines(), observer, ServerConfig(log_interval=0)), observer).run())
