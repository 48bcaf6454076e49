"""What a process does with the library, be it the engine's or a worker's: alike, or a worker would show nothing."""

from __future__ import annotations

import json
import struct
import threading
from array import array
from collections.abc import Callable
from typing import IO, Final

from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper

from gapless.errors import InternalError

STACK: Final = 512 << 20  # bytes of addresses; the library recurses as deep as a grammar's rules go
_SIZE: Final = struct.Struct("<Q")
_stacks: Final = threading.Lock()


def limits() -> LLParserLimits:
    """Of the library, for compiling and for each step. A step's are some 20 ms; lexer states take 1 to 2 KB each.

    They do not bound all that it does: the product of two patterns or of two multipleOf is searched without fuel.
    """
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_items_in_row=2_000,
        max_lexer_states=20_000,
        max_grammar_size=500_000,
        verbose_errors=False,
    )


def start_deep(thread: threading.Thread) -> None:
    """With a deep stack. The size is a setting of the whole process while a thread starts."""
    with _stacks:
        before = threading.stack_size(STACK)
        try:
            thread.start()
        except RuntimeError as error:
            raise InternalError(f"no thread for a grammar: {error}") from error
        finally:
            threading.stack_size(before)


def pack_tokens(tokens: list[bytes], end_id: int, special: list[int]) -> bytes:
    """The bytes of all tokens, the one that stands for the end, and the other special ones."""
    head = json.dumps({"end_id": end_id, "special": special}).encode()
    sizes = array("I", [len(token) for token in tokens]).tobytes()
    return b"".join(_SIZE.pack(len(part)) + part for part in (head, sizes)) + b"".join(tokens)


def table_of(packed: bytes, encode: Callable[[bytes | str], list[int]]) -> LLTokenizer:
    """The library's table of what pack_tokens() gave."""
    begin, parts = 0, list[bytes]()
    for _ in range(2):
        (size,) = _SIZE.unpack_from(packed, begin)
        parts.append(packed[begin + _SIZE.size : begin + _SIZE.size + size])
        begin += _SIZE.size + size
    tokens: list[bytes] = []
    for size in array("I", parts[1]):
        tokens.append(packed[begin : begin + size])
        begin += size
    return LLTokenizer(TokenizerWrapper(_Table(tokens, encode, **json.loads(parts[0]))))


def send(stream: IO[bytes], message: bytes) -> None:
    """One message between the engine's process and a worker."""
    stream.write(_SIZE.pack(len(message)) + message)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """The next message, None if the other end is gone."""
    head = stream.read(_SIZE.size)
    if len(head) < _SIZE.size:
        return None
    (size,) = _SIZE.unpack(head)
    message = stream.read(size)
    return message if len(message) == size else None


class _Table:
    """What TokenizerWrapper reads."""

    bos_token_id: int | None = None

    def __init__(
        self, tokens: list[bytes], encode: Callable[[bytes | str], list[int]], end_id: int, special: list[int]
    ) -> None:
        self._encode = encode
        self.tokens = tokens
        self.eos_token_id = end_id
        self.special_token_ids = special

    def __call__(self, data: bytes | str) -> list[int]:
        return self._encode(data)
