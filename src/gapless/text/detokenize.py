"""Incremental detokenisation: text as soon as it is certain, and in the end exactly what decoding at once gives."""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Sequence
from typing import Protocol

import tokenizers


class Detokenizer(Protocol):
    """Turns the token ids of one continuation into text. The pieces add up to decode() of all ids."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these further ids make certain; often "" while a character is incomplete."""
        ...

    def flush(self) -> str:
        """The rest, with U+FFFD for what stayed incomplete. Nothing may be pushed afterwards."""
        ...


class ByteLevelDetokenizer:
    """For byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM): a token is bytes, so only UTF-8 has to be waited for.

    Constant time and memory per token, whatever the tokens. `token_bytes` is a cache shared by a tokenizer's streams.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, skipped_ids: frozenset[int], token_bytes: dict[int, bytes] | None = None
    ) -> None:
        self._inner = inner
        self._skipped_ids = skipped_ids
        self._token_bytes: dict[int, bytes] = {} if token_bytes is None else token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        known, skipped = self._token_bytes, self._skipped_ids
        data = b"".join(known[i] if i in known else self._bytes_of(i) for i in token_ids if i not in skipped)
        return self._decoder.decode(data)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def _bytes_of(self, token_id: int) -> bytes:
        token = self._inner.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        found = self._token_bytes[token_id] = bytes_of_token(token)
        return found


class WindowDetokenizer:
    """For any other decoder: decodes a window of the last ids, before and after, and gives the difference.

    The window starts where text was last given out, so the cost per token stays small. Text waits
    - while the last token is a byte like <0xE4>: a run of bytes is read as a whole, and one bad byte spoils it all;
    - while it ends in U+FFFD, up to as many tokens as a character can have bytes.
    """

    _LONGEST_WAIT = 4

    def __init__(self, inner: tokenizers.Tokenizer, skipped_ids: frozenset[int]) -> None:
        self._inner = inner
        self._skipped_ids = skipped_ids
        self._given: list[int] = []  # ids whose text was given out last: the left context of what follows
        self._given_text = ""
        self._held: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(self._push_one(token_id) for token_id in token_ids)

    def flush(self) -> str:
        return self._give(final=True)

    def _push_one(self, token_id: int) -> str:
        token = self._inner.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None or token_id in self._skipped_ids:
            return ""
        self._held.append(token_id)
        if BYTE_TOKEN.fullmatch(token):
            return ""
        return self._give(final=False)

    def _give(self, *, final: bool) -> str:
        window = self._given + self._held
        text = self._inner.decode(window, skip_special_tokens=False)
        new = text[len(self._given_text) :]
        waiting = new.endswith("\ufffd") and len(self._held) < self._LONGEST_WAIT
        if not new or (waiting and not final):
            return ""
        self._given, self._held = self._held, []
        self._given_text = self._inner.decode(self._given, skip_special_tokens=False)
        return new


BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def bytes_of_token(token: str | None) -> bytes:
    """The bytes of a token of byte-level BPE.

    One with a character outside of the byte alphabet stands for itself; None, an unknown id, for nothing.
    """
    if token is None:
        return b""
    alphabet = byte_alphabet()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:
        return token.encode()


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """Character -> byte of the printable alphabet of GPT-2's byte-level BPE.

    Printable Latin-1 stands for itself; the other 68 bytes are, in order, the characters from U+0100 on.
    Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), and its published encoder.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
