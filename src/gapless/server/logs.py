"""The server's log on stderr, as text or JSON lines: requests as they end, and now and then how it goes.

Lines go through a queue to a thread that writes, so nobody waits for a slow disk or terminal. Nothing of a prompt or an
answer is logged.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Mapping
from copy import copy
from logging import LogRecord
from typing import Any, Self, TextIO

from gapless.server.config import LogFormat
from gapless.server.context import Context, UnavailableError
from gapless.server.observer import RequestRecord, ServerObserver
from gapless.server.readings import Rates

MAX_QUEUED = 10_000  # lines; more are lost, and counted
STOP_SECONDS = 2.0  # that a stuck reader of the log can hold up the end of the server
_FIELDS = "gapless_fields"
_requests = logging.getLogger("gapless.requests")
_progress = logging.getLogger("gapless.progress")


class ServerLog:
    """Takes over the root logger while the server runs, uvicorn's lines with it: start uvicorn with log_config=None and
    access_log=False. Ours and uvicorn's come from INFO on, other libraries' from WARNING on."""

    def __init__(self, log_format: LogFormat, stream: TextIO | None = None) -> None:
        self._lines: queue.Queue[LogRecord | None] = queue.Queue(MAX_QUEUED)
        self._output = logging.StreamHandler(stream or sys.stderr)
        self._output.setFormatter(_JsonLines() if log_format == "json" else _TextLines())
        self._input = _ToQueue(self._lines)
        self._thread = threading.Thread(target=self._write, name="gapless-log", daemon=True)
        self._before: list[logging.Handler] = []
        self._levels: dict[str, int] = {}

    def __enter__(self) -> Self:
        root = logging.getLogger()
        self._before, root.handlers = root.handlers, [self._input]
        for name, level in (("", logging.WARNING), ("gapless", logging.INFO), ("uvicorn", logging.INFO)):
            logger = logging.getLogger(name)
            self._levels[name] = logger.level
            logger.setLevel(level)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().handlers = self._before
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        try:
            self._lines.put(None, timeout=STOP_SECONDS)
        except queue.Full:
            return
        self._thread.join(STOP_SECONDS)

    def _write(self) -> None:
        while (record := self._lines.get()) is not None:
            self._output.handle(record)


class _ToQueue(logging.Handler):
    def __init__(self, lines: queue.Queue[LogRecord | None]) -> None:
        super().__init__()
        self._lines = lines
        self._lost = 0

    def emit(self, record: LogRecord) -> None:
        finished = copy(record)
        finished.msg, finished.args = record.getMessage(), None  # its arguments may change before it is written
        try:
            if self._lost:
                self._lines.put_nowait(_warning(f"{self._lost} lines of the log were lost: its reader is too slow"))
                self._lost = 0
            self._lines.put_nowait(finished)
        except queue.Full:
            self._lost += 1


class _TextLines(logging.Formatter):
    def format(self, record: LogRecord) -> str:
        """On one line, whatever a client put into its request id; a traceback below."""
        line = f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}"
        plain = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)
        return f"{plain}\n{self.formatException(record.exc_info)}" if record.exc_info else plain


class _JsonLines(logging.Formatter):
    def format(self, record: LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class RequestLog:
    """A Listener that logs a line for each request."""

    def ended(self, record: RequestRecord) -> None:
        fields: dict[str, Any] = {
            "request_id": record.request_id,
            "endpoint": record.endpoint,
            "finish_reason": record.reason,
            "prompt_tokens": record.usage.prompt_tokens if record.usage else None,
            "cached_tokens": record.usage.cached_tokens if record.usage else None,
            "completion_tokens": record.usage.completion_tokens if record.usage else record.tokens,
            "ttft_seconds": None if record.ttft is None else round(record.ttft, 6),
            "seconds": round(record.seconds, 6),
        }
        prompt = f"{record.usage.prompt_tokens} + " if record.usage else ""
        first = "" if record.ttft is None else f", first after {record.ttft:.3f} s"
        text = f"{prompt}{fields['completion_tokens']} tokens{first}, {record.seconds:.3f} s"
        _log(_requests, f"{record.request_id} {record.endpoint} {record.reason}, {text}", fields)

    def refused(self, request_id: str, endpoint: str, status: int) -> None:
        fields = {"request_id": request_id, "endpoint": endpoint, "status": status}
        _log(_requests, f"{request_id} {endpoint} refused with {status}", fields)


class ProgressLog:
    """Logs how it goes. Nothing while nothing happens: no line, and no question to the engine."""

    def __init__(self, context: Context, observer: ServerObserver) -> None:
        self._context = context
        self._observer = observer
        self._before = observer.engine.sample
        self._opened = 0
        self._was_open = False

    async def run(self) -> None:
        """Every log_interval seconds, until it is cancelled."""
        interval = self._context.config.log_interval
        while interval:
            await asyncio.sleep(interval)
            await self.tick()

    async def tick(self) -> None:
        """One line, if requests were open since the last one."""
        observer = self._observer
        idle = observer.opened_total == self._opened and not self._was_open
        self._opened, self._was_open = observer.opened_total, observer.open > 0
        if idle:
            self._before = self._before._replace(time=observer.engine.clock())
            return
        try:
            live = await observer.engine.read(self._context.engines)
        except UnavailableError as error:
            _log(_progress, f"{observer.open} requests open, no figures: {error}", {"requests_open": observer.open})
            return
        before, self._before = self._before, observer.engine.sample
        rates = Rates.between(before, self._before)
        fields: dict[str, Any] = {
            "requests_running": live.running,
            "requests_waiting": live.waiting,
            "prompt_tokens_per_second": round(rates.prompt_tokens_per_second, 1),
            "generation_tokens_per_second": round(rates.generated_tokens_per_second, 1),
            "kv_usage_ratio": round(live.kv_blocks_used / live.kv_blocks, 4),
            "gpu_busy_ratio": None if rates.busy_share is None else round(rates.busy_share, 4),
        }
        busy = "" if rates.busy_share is None else f", busy {rates.busy_share:.0%}"
        _log(
            _progress,
            f"{live.running} running, {live.waiting} waiting, {rates.prompt_tokens_per_second:.1f} prompt and "
            f"{rates.generated_tokens_per_second:.1f} generated tokens/s, "
            f"KV {live.kv_blocks_used / live.kv_blocks:.0%}{busy}",
            fields,
        )


def _log(logger: logging.Logger, message: str, fields: Mapping[str, Any]) -> None:
    """`fields` stand beside the message in a JSON line."""
    logger.info("%s", message, extra={_FIELDS: fields})


def _time(record: LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _warning(message: str) -> LogRecord:
    return LogRecord(__name__, logging.WARNING, __file__, 0, message, None, None)
