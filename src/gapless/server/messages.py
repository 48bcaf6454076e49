"""What server and engine process say to each other: msgpack over a unix socket, each message behind its length.

Numbers of a step travel as the bytes of arrays, so the cost of a message hardly grows with the batch. Nothing here can
make the receiver run code: a message is one of these types or an error.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np

from gapless.config import EngineConfig, SchedulerLimits
from gapless.engine.core import EngineStats
from gapless.errors import InternalError
from gapless.loading import Load
from gapless.outcome import Committed, Finished, LogprobLines, PromptLogprobs
from gapless.spans import Run

_LENGTH = struct.Struct("<I")
_MAX_BYTES = 2**31
_HELD = 2**20  # bytes to ask the socket for at once


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One of those below."""


class Start(Message, frozen=True):
    """To the engine, first of all: load this. timeline: steps of which spans are kept."""

    model: str
    load: Load
    shape: str | None
    tokenizer: str | None
    config: EngineConfig
    timeline: int


class Ready(Message, frozen=True):
    """From the engine, once: it takes requests."""

    model_name: str
    device_name: str
    tokenizer_folder: str | None
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    limits: SchedulerLimits
    config: EngineConfig


class Failed(Message, frozen=True):
    """From the engine, its last word: it could not start, or has died. error: a name of errors.py."""

    error: str
    text: str


class Sent(Message, frozen=True):
    """A request. params: those of SamplingParams that are not the default. Arrays: bytes of int32 and float32."""

    request_id: int
    prompt: bytes
    params: dict[str, Any]
    max_length: int
    stop_ids: bytes
    seed: int
    priority: int
    salt: bytes
    digests: bytes
    leader: int
    line: bytes
    counts: bool
    arguments: bytes


class Submit(Message, frozen=True):
    """To the engine: the n continuations of one prompt."""

    requests: list[Sent]


class Cancel(Message, frozen=True):
    """To the engine: end these."""

    request_ids: list[int]


class Ask(Message, frozen=True):
    """To the engine: do what `what` says and send an Answer with this number."""

    number: int
    what: str  # a name of ASKED
    argument: int


ASKED = ("stats", "timeline", "lookahead", "pause", "resume", "sleep", "wake")


class StatsAnswer(Message, frozen=True):
    """From the engine."""

    number: int
    stats: EngineStats


class TimelineAnswer(Message, frozen=True):
    """From the engine: the fields of Run, those of Span among them."""

    number: int
    runs: list[Run]


class Answer(Message, frozen=True):
    """From the engine: it is done, or what went wrong, by a name of errors.py."""

    number: int
    error: str | None = None
    text: str = ""


class Lines(msgspec.Struct, frozen=True, array_like=True):
    """LogprobLines."""

    places: int
    ids: bytes
    logprobs: bytes
    ranks: bytes


class Step(Message, frozen=True):
    """From the engine: a step's Committed. prompts: request id, begin, lines."""

    request_ids: bytes
    tokens: bytes
    finished: tuple[Finished, ...]
    logprobs: Lines | None = None
    prompts: list[tuple[int, int, Lines]] = []
    restarted: list[int] = []


ToEngine = Start | Submit | Cancel | Ask
FromEngine = Ready | Failed | Step | Answer | StatsAnswer | TimelineAnswer


def encode(message: Message) -> bytes:
    """For send_encoded(). Raises InternalError for what no message can hold, such as an integer beyond 64 bits."""
    try:
        data = msgspec.msgpack.encode(message)
    except (OverflowError, TypeError, ValueError, RecursionError) as error:  # MsgspecError is a ValueError
        raise InternalError(f"a message can not be sent: {error}") from error
    if len(data) >= _MAX_BYTES:
        raise InternalError(f"a message of {len(data)} bytes is too long")
    return _LENGTH.pack(len(data)) + data


class Wire:
    """One end of the socket. One thread reads; sending is for one thread at a time."""

    def __init__(self, end: socket.socket, reads: Any) -> None:
        """reads: the type of messages that come in, ToEngine or FromEngine."""
        self._socket = end
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(reads)
        self._file = end.makefile("rb", buffering=_HELD)

    def send(self, message: Message) -> None:
        """Raises OSError if the other end is gone."""
        self.send_encoded(encode(message))

    def send_encoded(self, data: bytes) -> None:
        """What encode() made. Raises OSError if the other end is gone."""
        self._socket.sendall(data)

    def receive(self) -> Any:
        """The next message; None when the other end is gone, and the socket is closed then. Raises InternalError for
        what is no message."""
        data = self._read()
        if data is None:
            self.drop()
            return None
        try:
            return self._decoder.decode(data)
        except msgspec.MsgspecError as error:
            raise InternalError(f"a message between server and engine makes no sense: {error}") from error

    def _read(self) -> bytes | None:
        try:
            head = self._file.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                return None
            [length] = _LENGTH.unpack(head)
            if length >= _MAX_BYTES:
                raise InternalError(f"a message of {length} bytes is too long")
            data = self._file.read(length)
        except (OSError, ValueError):  # a file that was closed is a ValueError
            return None
        return data if len(data) == length else None

    def close(self) -> None:
        """End both directions, from any thread; who waits in receive() gets None."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        """Close the socket. For the thread that reads, when it reads no more."""
        self._file.close()
        self._socket.close()


def pack_step(record: Committed) -> Step:
    """For the wire."""
    return Step(
        request_ids=record.request_ids.tobytes(),
        tokens=record.tokens.tobytes(),
        finished=record.finished,
        logprobs=None if record.logprobs is None else _pack_lines(record.logprobs),
        prompts=[(piece.request_id, piece.begin, _pack_lines(piece.lines)) for piece in record.prompts],
        restarted=list(record.restarted),
    )


def unpack_step(step: Step) -> Committed:
    """From the wire."""
    return Committed(
        request_ids=np.frombuffer(step.request_ids, dtype=np.int64),
        tokens=np.frombuffer(step.tokens, dtype=np.int32),
        finished=step.finished,
        logprobs=None if step.logprobs is None else _unpack_lines(step.logprobs),
        prompts=tuple(PromptLogprobs(each[0], each[1], _unpack_lines(each[2])) for each in step.prompts),
        restarted=tuple(step.restarted),
    )


def _pack_lines(lines: LogprobLines) -> Lines:
    return Lines(lines.ids_LK.shape[1], lines.ids_LK.tobytes(), lines.logprobs_LK.tobytes(), lines.ranks_L.tobytes())


def _unpack_lines(lines: Lines) -> LogprobLines:
    return LogprobLines(
        np.frombuffer(lines.ids, dtype=np.int32).reshape(-1, lines.places),
        np.frombuffer(lines.logprobs, dtype=np.float32).reshape(-1, lines.places),
        np.frombuffer(lines.ranks, dtype=np.int32),
    )
