"""Lines of JSON as requests: `prompt`, `prompt_token_ids` or `messages`, any sampling options, and an `id`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from gapless.errors import InvalidRequestError
from gapless.params import SamplingParams

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
OPTION_KEYS = ("priority", "cache_salt")
NO_FORM: dict[str, Any] = {"json_schema": None, "json_object": False, "regex": None, "choice": None, "grammar": None}
SAMPLING_KEYS = tuple(
    field.name for field in dataclasses.fields(SamplingParams) if field.init and field.name != "allowed_tokens"
)  # which is a function
MAX_LINE_BYTES = 64 * 2**20
_READ_AHEAD = 256


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input that is not blank. `index` counts these from 0, `number` counts all lines from 1."""

    index: int
    number: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Job:
    """What a line asks for. `prompt` is an argument of LLM.prepare."""

    prompt: Any
    params: SamplingParams


def parse_line(data: bytes, defaults: SamplingParams) -> tuple[Job, object]:
    """The request of a line and its `id`, None without one. Raises BadLineError."""
    if len(data) > MAX_LINE_BYTES:
        raise BadLineError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        value = json.loads(data.decode("utf-8-sig").rstrip())  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise BadLineError(f"not valid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise BadLineError("not valid JSON: a number is too long or the nesting too deep") from error
    if not isinstance(value, dict):
        raise BadLineError("a line must hold a JSON object")
    fields = cast("dict[str, Any]", value)
    given_id = fields.pop("id", None)
    try:
        return _job(fields, defaults), given_id
    except InvalidRequestError as error:
        raise BadLineError(str(error), given_id) from error


def _job(fields: dict[str, Any], defaults: SamplingParams) -> Job:
    known = (*PROMPT_KEYS, *OPTION_KEYS, *SAMPLING_KEYS)
    for key in fields:
        if key not in known:
            close = difflib.get_close_matches(key, (*known, "id"), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are id, {', '.join(known)}"
            raise InvalidRequestError(f"unknown key {key!r}; {hint}")
    prompts = {key: fields.pop(key) for key in PROMPT_KEYS if key in fields}
    if len(prompts) != 1:
        raise InvalidRequestError(f"a line has exactly one of {', '.join(PROMPT_KEYS)}, not {len(prompts)} of them")
    options = {key: fields.pop(key) for key in OPTION_KEYS if key in fields}
    if not fields.keys().isdisjoint(NO_FORM):  # a line's form goes over any other one
        fields = {**NO_FORM, **fields}
    return Job({**prompts, **options}, dataclasses.replace(defaults, **fields))


class BadLineError(InvalidRequestError):
    """A line that is no request. `given_id` is its id as far as it could be read."""

    def __init__(self, message: str, given_id: object = None) -> None:
        super().__init__(message)
        self.given_id = given_id


class LineReader:
    """Reads lines in a thread, a little ahead, so that a slow pipe holds up no answers. Closes the stream.

    drawn  lines that next() has given
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.drawn = 0
        self._lines: queue.Queue[Line | OSError | None] = queue.Queue(_READ_AHEAD)
        self._ended = False
        threading.Thread(target=self._read, name="gapless-input", daemon=True).start()

    @property
    def ended(self) -> bool:
        return self._ended

    def next(self, *, wait: bool) -> Line | None:
        """The next line; None at the end, or if there is none yet and we shall not wait. Raises OSError."""
        if self._ended:
            return None
        try:
            found = self._lines.get(block=wait)
        except queue.Empty:
            return None
        if isinstance(found, OSError):
            raise found
        self._ended = found is None
        self.drawn += found is not None
        return found

    def _read(self) -> None:
        try:
            with self._stream:
                for line in lines_of(self._stream):
                    self._lines.put(line)
            self._lines.put(None)
        except OSError as error:
            self._lines.put(error)


def lines_of(stream: BinaryIO) -> Iterator[Line]:
    """Those that are not blank. Of a line over the limit only as much is kept as shows that it is too long."""
    index = number = 0
    while data := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        rest = data
        while not rest.endswith(b"\n") and (rest := stream.readline(2**20)):
            pass
        if data.strip():
            yield Line(index, number, data)
            index += 1
