"""OpenAI's batch files: each line a request to one of the server's paths, each answer a line of the output.

The lines go through the server's own application, without a socket, so an answer is what the server would give. The
engine has a process of its own here, too. What is in the files is the state: a run that was killed goes on with the
lines that have no answer yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from starlette.types import ASGIApp, Message

from gapless.errors import ConfigError, EngineDeadError, InputFileError
from gapless.progress import Progress
from gapless.server.app import create_app
from gapless.server.config import ServerConfig
from gapless.server.context import Context
from gapless.server.messages import Start
from gapless.server.observer import ServerObserver
from gapless.server.supervisor import Supervisor
from gapless.weights.source import DEMO

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MAX_LINE_BYTES = 64 * 2**20
MAX_ID_LENGTH = 512
MAX_DEPTH = 256  # the server takes 200; how deep json goes depends on who calls it
_LOOK_SECONDS = 0.05
_SEED_BITS = 63
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what file systems without locks say
_ALL = 2**31  # the window bounds what is open
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A request of a batch file."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(slots=True)
class Answered:
    """What an output and its errors hold.

    ids     custom ids of the requests that are answered
    failed  how many of them with an error
    sizes   bytes up to the end of the last whole line, by path
    """

    ids: set[str] = field(default_factory=set[str])
    failed: int = 0
    sizes: dict[Path, int] = field(default_factory=dict[Path, int])


def read_batch(path: Path) -> Iterator[BatchLine]:
    """The requests of a file, blank lines left out. Raises InputFileError for the first line that is none, and for a
    custom_id that comes again."""
    seen: dict[str, int] = {}
    try:
        with path.open("rb") as stream:
            for number, data in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), 1):
                if data.strip():
                    line = _parse(path, number, data)
                    if (before := seen.setdefault(line.custom_id, number)) != number:
                        raise _wrong(path, number, f"the custom_id {line.custom_id!r} is that of line {before}, too")
                    yield line
    except OSError as error:
        raise InputFileError(f"the input {path} can not be read: {error.strerror}") from error


def read_answered(output: Path, errors: Path) -> Answered:
    """What earlier runs have written. A line that is broken off counts as not written. Raises ConfigError for a file
    that is no output of a batch."""
    found = Answered()
    for path in (output, errors):
        if not path.exists():
            continue
        size = 0
        with path.open("rb") as stream:
            for number, data in enumerate(stream, 1):
                if not data.endswith(b"\n"):
                    break
                custom_id = _answered_id(data)
                if custom_id is None or custom_id in found.ids:
                    raise ConfigError(
                        f"--resume: line {number} of {path} is no answer of gapless run-batch, or a second"
                    )
                found.ids.add(custom_id)
                found.failed += path == errors
                size += len(data)
        found.sizes[path] = size
    return found


class Batch:
    """One run over one file.

    window   requests that are open at a time
    done     lines that are answered, those of earlier runs included
    failed   of them, those with an error
    """

    def __init__(
        self, source: Path, output: Path, errors: Path, *, answered: Answered, total: int, model_names: tuple[str, ...]
    ) -> None:
        self._source = source
        self._output = output
        self._errors = errors
        self._answered = answered
        self._model_names = model_names
        self.total = total
        self.done = len(answered.ids)
        self.failed = answered.failed
        self._open = 0
        self._progress = Progress(total, None if self.done < total else False, done=self.done)

    def progress(self) -> str:
        """How far it is: for the last words of a run that was cut short."""
        return f"{self.done} of {self.total} lines are answered. To go on, repeat the command with --resume"

    def run(self, start: Start) -> None:
        """Answer what is not answered. Raises GaplessError, OSError, KeyboardInterrupt."""
        asyncio.run(self._run(start))

    async def _run(self, start: Start) -> None:
        supervisor = Supervisor(start)
        window = 2 * start.config.max_rows
        config = ServerConfig(model_names=self._model_names, max_open=_ALL, max_body_bytes=MAX_LINE_BYTES, page=False)
        alias = start.model if start.model == DEMO else None
        app = create_app(Context(config=config, engines=supervisor, observer=ServerObserver(), created=0, alias=alias))
        engine = asyncio.create_task(supervisor.run())
        try:
            await _ready(supervisor)
            with (
                self._progress,
                _appending(self._output, self._answered) as output,
                _appending(self._errors, self._answered) as errors,
            ):
                await self._answer_all(supervisor, app, window, output, errors)
        finally:
            await supervisor.close()
            await engine
            if self._errors.exists() and not self._errors.stat().st_size:
                self._errors.unlink()

    async def _answer_all(
        self, supervisor: Supervisor, app: ASGIApp, window: int, output: BinaryIO, errors: BinaryIO
    ) -> None:
        lines = (line for line in read_batch(self._source) if line.custom_id not in self._answered.ids)

        async def worker() -> None:
            for line in lines:  # shared by all of them
                self._open += 1
                status, record = await _answer(supervisor, app, line)
                self._open -= 1
                _write(output if status == 200 else errors, record)
                self.done += 1
                self.failed += status != 200
                usage = record["response"]["body"].get("usage") or {}
                tokens = usage.get("completion_tokens", usage.get("output_tokens", 0))
                self._progress.advance(tokens=tokens, running=self._open, finished=1)

        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(window):
                    workers.create_task(worker())
        except ExceptionGroup as group:  # all have the same to say
            raise group.exceptions[0] from None


async def _answer(supervisor: Supervisor, app: ASGIApp, line: BatchLine) -> tuple[int, dict[str, Any]]:
    """The status and the line of one answer; asked again if the engine dies meanwhile. Raises EngineDeadError."""
    digest = hashlib.sha256(line.custom_id.encode()).hexdigest()
    request_id = f"batch_req_{digest[:24]}"
    body = line.body
    if body.get("seed") is None:  # the same wherever a run was cut short
        body = {**body, "seed": int(digest, 16) >> (256 - _SEED_BITS)}
    while True:
        await _ready(supervisor)
        if body.get("stream"):
            status, answer = 400, _error("stream is for the server: a batch gives whole answers", "stream")
        else:
            status, answer = await post(app, line.url, json.dumps(body).encode(), request_id)
        code = (answer.get("error") or {}).get("code")
        if status not in (429, 503) and code != "engine_dead":
            response = {"status_code": status, "request_id": request_id, "body": answer}
            return status, {"id": request_id, "custom_id": line.custom_id, "response": response, "error": None}
        await asyncio.sleep(_LOOK_SECONDS)


async def post(app: ASGIApp, url: str, body: bytes, request_id: str) -> tuple[int, dict[str, Any]]:
    """One request to the application, without a socket."""
    sent: list[Message] = []
    asked = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        message = next(asked, None)
        if message is None:  # the client stays
            await asyncio.Event().wait()
        return cast("Message", message)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())],
        "client": None,
        "server": None,
    }
    await app(scope, receive, send)
    content = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(content)


async def _ready(supervisor: Supervisor) -> None:
    """Wait until there is an engine. Raises the GaplessError that keeps it from coming."""
    while supervisor.state != "ready":
        if supervisor.state == "dead":
            raise supervisor.error or EngineDeadError("the engine has died")
        await asyncio.sleep(_LOOK_SECONDS)


def _error(message: str, param: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}


@contextlib.contextmanager
def _appending(path: Path, answered: Answered) -> Generator[BinaryIO]:
    """What is kept of a file, to be added to. Unbuffered: a line is written when it is there."""
    size = answered.sizes.get(path, 0)
    with path.open("ab", buffering=0) as file:
        if os.fstat(file.fileno()).st_size > size:
            os.truncate(path, size)
        yield file


@contextlib.contextmanager
def only_run(output: Path) -> Generator[None]:
    """No other run writes to the same output meanwhile. Raises ConfigError, OSError."""
    is_new = not output.exists()
    with output.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another run is writing to {output}") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _log.warning("the file system of %s has no locks: no other run may write to it meanwhile", output)
        try:
            yield
        finally:
            if is_new and not output.stat().st_size:
                output.unlink()


def _write(file: BinaryIO, record: dict[str, Any]) -> None:
    """Add a whole line, or none of it: another worker may write behind it. Raises OSError."""
    line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    size = os.fstat(file.fileno()).st_size
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise OSError(error.errno, error.strerror, file.name) from error


def _parse(path: Path, number: int, data: bytes) -> BatchLine:
    if len(data) > MAX_LINE_BYTES:
        raise _wrong(path, number, f"it is longer than {MAX_LINE_BYTES} bytes")
    try:
        value: object = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _wrong(path, number, "it is not JSON") from error
    if not isinstance(value, dict):
        raise _wrong(path, number, "it is not a JSON object")
    fields = cast("dict[str, Any]", value)
    custom_id, url, body = fields.get("custom_id"), fields.get("url"), fields.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_LENGTH:
        raise _wrong(path, number, f"custom_id must be a text of 1 to {MAX_ID_LENGTH} characters")
    if any("\ud800" <= letter <= "\udfff" for letter in custom_id):
        raise _wrong(path, number, "custom_id has half of a surrogate pair and is not valid Unicode")
    if fields.get("method", "POST") != "POST":
        raise _wrong(path, number, "method must be POST")
    if url not in URLS:
        raise _wrong(path, number, f"url must be one of {', '.join(URLS)}, not {url!r:.99}")
    if not isinstance(body, dict):
        raise _wrong(path, number, "body must be an object")
    if not _is_flat(fields, MAX_DEPTH):
        raise _wrong(path, number, f"it is nested deeper than {MAX_DEPTH} levels")
    return BatchLine(number, custom_id, url, body)


def _is_flat(value: object, depth: int) -> bool:
    """Whether it is nested in at most so many levels."""
    level: list[Any] = [value]
    for _ in range(depth):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for values in inner for each in values if isinstance(each, dict | list)]
        if not level:
            return True
    return False


def _wrong(path: Path, number: int, what: str) -> InputFileError:
    return InputFileError(f"line {number} of {path}: {what}")


def _answered_id(data: bytes) -> str | None:
    try:
        value: object = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    fields = cast("dict[str, Any]", value)
    custom_id = fields.get("custom_id")
    return custom_id if isinstance(custom_id, str) and isinstance(fields.get("response"), dict) else None
