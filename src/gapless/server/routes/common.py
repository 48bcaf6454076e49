"""What chat and completions do alike."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import msgspec

from gapless.outputs import CompletionOutput, Usage
from gapless.server.context import Context
from gapless.server.http.errors import ApiError
from gapless.server.http.sse import DONE, failure
from gapless.server.protocol.answers import UsageBody
from gapless.server.protocol.sampling import StreamOptions
from gapless.text.messages import measure
from gapless.text.tokenizer import Tokenizer

LONG_TEXT = 16_384  # characters; a longer prompt is read on a thread
MANY_VALUES = 1_000  # texts, numbers, lists and objects; a chat with more is read on a thread
LONGEST_TOKEN = 256  # characters; no vocabulary has longer ones
MANY_LOGPROBS = 4_096  # more are put together on a thread

_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class Head:
    """What all chunks of an answer begin with."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))


def model_of(context: Context, asked: str | None) -> str:
    """The name to answer under. Raises ApiError if it is no model of this server, UnavailableError."""
    names = context.model_names
    if asked is None:
        return names[0]
    if asked not in names:
        message = f"there is no model {asked!r} here, but {' or '.join(names)}"
        raise ApiError(404, message, code="model_not_found", param="model")
    return asked


def is_long(*data: object) -> bool:
    """Whether reading a chat, its tools and its template's arguments takes time.

    Raises InvalidRequestError for too many values.
    """
    size = measure(*data)
    return size.characters > LONG_TEXT or size.values > MANY_VALUES


def check_length(size: int, limit: int, *, text: bool) -> None:
    """Refuse what can not fit before it is read, which takes time. size: characters of a text, else token ids.

    Raises ApiError.
    """
    most = limit * LONGEST_TOKEN if text else limit
    if size > most:
        unit = "characters" if text else "tokens"
        message = f"the prompt has {size} {unit}; the context limit is {limit} tokens, the answer included"
        raise ApiError(400, message, code="context_length_exceeded")


class Chunks:
    """Writes chunks: what is the same in all of an answer is encoded once."""

    def __init__(self, head: Head, kind: str, options: StreamOptions | None) -> None:
        self._begin = b'data: {"id":%b,"object":%b,"created":%d,"model":%b,"choices":[' % (
            _encoder.encode(head.id),
            _encoder.encode(kind),
            head.created,
            _encoder.encode(head.model),
        )
        self._usage_at_end = bool(options and options.include_usage)
        self.usage_always = bool(options and options.continuous_usage_stats)
        self._end = b'],"usage":null}\n\n' if self._usage_at_end else b"]}\n\n"

    def chunk(self, choice: msgspec.Struct, usage: Usage | None = None) -> bytes:
        """With one choice. `usage` if usage_always."""
        end = self._end if usage is None else b'],"usage":%b}\n\n' % _encoder.encode(UsageBody.of(usage))
        return self._begin + _encoder.encode(choice) + end

    def text(self, before: bytes, text: str, behind: bytes) -> bytes:
        """With one choice that has nothing but text, by far the most: its JSON before and behind that is at hand."""
        return b"%b%b%b%b%b" % (self._begin, before, _encoder.encode(text), behind, self._end)

    def end(self, usage: Usage) -> bytes:
        """What comes after the last choice."""
        if not self._usage_at_end:
            return DONE
        return self._begin + b'],"usage":%b}\n\n' % _encoder.encode(UsageBody.of(usage)) + DONE

    def fail(self, error: ApiError) -> bytes:
        """What comes in place of the end."""
        return failure(error)


def shows_something(output: CompletionOutput, tokenizer: Tokenizer | None, *, ids: bool | None) -> bool:
    """Whether a chunk is due: half a character alone is none, but without a tokenizer there is nothing but ids."""
    return bool(output.text or output.logprobs or ids or tokenizer is None)
