"""Stop strings: the engine finds them in tokens, the front end cuts the text at them, and both agree.

A request ends with the first token that completes one of its stop strings: decode() of its generated tokens has it, and
it ends in what differs from decode() of the tokens before. If the token completes several, the one that begins first
counts, and of those the first in the list. What was complete before a request's min_tokens is text like any other.
Special tokens have no text, so a stop string may span them. An incomplete character counts as what decode() shows for
it, U+FFFD: that matters only to a stop string with U+FFFD in it.
"""

from __future__ import annotations

import json
import re
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from gapless.text.detokenize import BYTE_TOKEN, Detokenizer, bytes_of_token
from gapless.text.prefixes import Prefixes

_REPLACEMENT = "\ufffd"
_CHUNK = 16  # token ids that are read at a time
_CACHED_SETS = 64  # each holds one byte per token of the vocabulary


class StopStrings:
    """The stop strings of a request. Safe to share between requests and threads.

    candidates  bool[V], read-only: only these tokens can be the last of a stop string's. V is the tokenizer's
                vocab_size; ids beyond it have no text and are no candidates.
    """

    def __init__(self, strings: tuple[str, ...], texts: TokenTexts) -> None:
        self.strings = strings
        self.candidates = texts.candidates(strings)
        self.candidates.setflags(write=False)
        self.prefixes = Prefixes(strings)
        self._texts = texts
        self._size = max(len(string.encode()) for string in strings)

    def completes(self, token_ids: NDArray[np.int32]) -> int | None:
        """Which of the strings the last of these generated tokens completes; None if none.

        To be asked after each candidate. The cost grows with the longest string, not with the number of tokens; only
        a run of byte tokens like <0xE4> has to be read as a whole.
        """
        found = self.locate(token_ids)
        return None if found is None else found[0]

    def locate(self, token_ids: NDArray[np.int32]) -> tuple[int, int] | None:
        """completes(), and how many characters before the end of all the text that string begins."""
        text, before = self._texts.tail(token_ids, self._size)
        if not any(string in text for string in self.strings):
            return None
        known = _common_length(before, text)
        found = [
            (at, index)
            for index, string in enumerate(self.strings)
            if (at := text.find(string, max(0, known + 1 - len(string)))) >= 0
        ]
        at, index = min(found, default=(-1, -1))
        return None if at < 0 else (index, len(text) - at)


class StopFilter:
    """A detokenizer of a continuation that may end by a stop string. The pieces add up to all the text before it.

    It holds back the longest tail that may still become a stop string. Linear in the text.
    """

    def __init__(self, inner: Detokenizer, stops: StopStrings) -> None:
        self._inner = inner
        self._prefixes = stops.prefixes
        self._held = ""
        self._state = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these further ids make certain and that can belong to no stop string. None of them is the
        continuation's last, so a stop string that is complete here has not ended it."""
        new = self._inner.push(token_ids)
        self._state = self._prefixes.read(self._state, new)
        text = self._held + new
        certain = len(text) - self._prefixes.depth[self._state]
        self._held = text[certain:]
        return text[:certain]

    def finish(self, token_ids: Sequence[int], surplus: int) -> str:
        """The rest, with the last ids, but for the last `surplus` characters of all the text."""
        rest = self._held + self._inner.push(token_ids) + self._inner.flush()
        return rest[: len(rest) - surplus]


class TokenTexts(Protocol):
    """What stop strings have to know of a vocabulary. Immutable, so that the engine's thread may read it any time."""

    def candidates(self, strings: Sequence[str]) -> NDArray[np.bool_]:
        """bool[V]: the tokens that can be the last of one of the strings. May say yes too often, never no."""
        ...

    def tail(self, token_ids: NDArray[np.int32], size: int) -> tuple[str, str]:
        """The end of decode(): all that changed with the last token, and `size` bytes before it or more. And the same,
        from the same place on, without the last token."""
        ...


class JoinedTexts:
    """For decoders that join the bytes of tokens: byte-level BPE, and SentencePiece's kind with byte fallback.

    tokens   the bytes of each; None has no text at all.
    runs     bool[V]: byte tokens like <0xE4>. A run of them that is no UTF-8 as a whole becomes as many U+FFFD.
    strips   one space at the start of all the text is left out.
    """

    _MARGIN = 3  # bytes at the start of a tail that may not be in the text: the end of a character, or a space

    def __init__(
        self, tokens: list[bytes | None], runs: NDArray[np.bool_] | None = None, *, strips: bool = False
    ) -> None:
        in_run = np.zeros(len(tokens), dtype=np.bool_) if runs is None else runs
        self._tokens = tokens
        self._in_run = in_run.tolist()
        self._strips = strips
        self._index = TokenIndex([token or b"" for token in tokens], in_run)

    def candidates(self, strings: Sequence[str]) -> NDArray[np.bool_]:
        return self._index.candidates(strings)

    def tail(self, token_ids: NDArray[np.int32], size: int) -> tuple[str, str]:
        tokens, in_run = self._tokens, self._in_run
        parts: list[bytes] = []  # the last first, and that does not count for what is missing
        run: list[bytes] = []
        newest = b""  # a run at the end without the last token
        missing = size + self._MARGIN
        for token in _backwards(token_ids):
            part = tokens[token] if token < len(tokens) else None
            if part is None:
                continue
            if in_run[token]:
                run.append(part)
                continue
            if run:
                whole = _text_of_run(run)
                if parts:
                    missing -= len(whole)
                else:
                    newest = _text_of_run(run[1:])
                parts.append(whole)
                run = []
            missing -= len(part) if parts else 0
            parts.append(part)
            if missing <= 0:
                break
        if run and not parts:
            newest = _text_of_run(run[1:])
        parts.append(_text_of_run(run))
        parts.reverse()
        text = self._decode(parts, torn=missing <= 0)
        if not self._has_text(token_ids[-1:]):
            return text, text
        parts[-1] = newest
        return text, self._decode(parts, torn=missing <= 0)

    def _has_text(self, last: NDArray[np.int32]) -> bool:
        return any(token < len(self._tokens) and self._tokens[token] is not None for token in last.tolist())

    def _decode(self, parts: list[bytes], *, torn: bool) -> str:
        data = b"".join(parts)
        text = (_without_torn(data, self._MARGIN) if torn else data).decode(errors="replace")
        return text[1:] if self._strips and text.startswith(" ") else text


class WindowTexts:
    """For any other decoder: all tokens with text are candidates, and the last ones are decoded again each time."""

    _MARGIN = 4  # characters at the start that may differ from decode() of all: a space, parts of a character

    def __init__(self, inner: tokenizers.Tokenizer, spelled: list[str | None], runs: NDArray[np.bool_]) -> None:
        self._inner = inner
        self._has_text = np.array([*(token is not None for token in spelled), False], dtype=np.bool_)
        self._runs = runs

    def candidates(self, strings: Sequence[str]) -> NDArray[np.bool_]:
        return self._has_text[:-1].copy()

    def tail(self, token_ids: NDArray[np.int32], size: int) -> tuple[str, str]:
        count = 8
        while True:
            ids = np.minimum(token_ids[-count:], self._runs.size)
            textless = bool(ids.size) and not self._has_text[ids[-1]]
            ids = ids[self._has_text[ids]]
            borders = np.flatnonzero(~self._runs[ids])  # a run is read as a whole, and so has none within
            whole = count >= token_ids.size
            if whole or borders.size:
                begin = 0 if whole else int(borders[0])
                last = int(borders[-1]) + 1 if borders.size else 0
                before = self._decode(ids[begin : min(last, ids.size - 1)])
                if whole or len(before) >= size + self._MARGIN:
                    start = 0 if whole else self._MARGIN
                    text = self._decode(ids[begin:])[start:]
                    return text, text if textless else self._decode(ids[begin:-1])[start:]
            count *= 2

    def _decode(self, token_ids: NDArray[np.int32]) -> str:
        return self._inner.decode(token_ids.tolist(), skip_special_tokens=False)


class TokenIndex:
    """Finds the tokens that can be the last of a string, without a look at each token in Python.

    runs  bool[V]: tokens that may add U+FFFD to a text even if they are ASCII.
    """

    def __init__(self, tokens: list[bytes], runs: NDArray[np.bool_]) -> None:
        self._tokens = tokens
        self._longest = max(map(len, tokens), default=0)
        self._order = sorted(range(len(tokens)), key=tokens.__getitem__)
        self._order_V = np.array(self._order, dtype=np.int32)
        self._joined = np.frombuffer(b"".join(token + b"\xff" for token in tokens), dtype=np.uint8)
        self._ends_V = np.cumsum([len(token) + 1 for token in tokens])
        self._may_replace = runs | np.array([not token.isascii() for token in tokens], dtype=np.bool_)

    def candidates(self, strings: Sequence[str]) -> NDArray[np.bool_]:
        """bool[V]. What a string has after its last U+FFFD is found as bytes; U+FFFD itself stands for many."""
        found = np.zeros(len(self._tokens), dtype=np.bool_)
        for string in strings:
            wanted = string.rpartition(_REPLACEMENT)[2].encode()
            if not wanted:
                found |= self._may_replace
                continue
            for begin in range(max(0, len(wanted) - self._longest), len(wanted)):
                found[self._starting_with(wanted[begin:])] = True
            if len(wanted) <= self._longest:
                found[self._containing(wanted)] = True
        return found

    def _starting_with(self, prefix: bytes) -> NDArray[np.int32]:
        behind = prefix[:-1] + bytes([prefix[-1] + 1])  # no byte of UTF-8 is 255
        low = bisect_left(self._order, prefix, key=self._tokens.__getitem__)
        if low == len(self._order) or not self._tokens[self._order[low]].startswith(prefix):
            return self._order_V[:0]
        high = bisect_left(self._order, behind, lo=low, key=self._tokens.__getitem__)
        return self._order_V[low:high]

    def _containing(self, wanted: bytes) -> NDArray[np.intp]:
        places = np.flatnonzero(self._joined[: -len(wanted)] == wanted[0])
        for offset in range(1, len(wanted)):
            places = places[self._joined[places + offset] == wanted[offset]]
            if not places.size:
                break
        return np.searchsorted(self._ends_V, places, side="right")


class StopCache:
    """A tokenizer's stop strings, made once for each list of strings; the latest are kept."""

    def __init__(self, inner: tokenizers.Tokenizer, skipped_ids: frozenset[int], vocab_size: int) -> None:
        self._vocabulary = (inner, skipped_ids, vocab_size)
        self._texts: TokenTexts | None = None
        self._made: OrderedDict[tuple[str, ...], StopStrings] = OrderedDict()
        self._lock = threading.Lock()

    def read(self) -> None:
        """Read the vocabulary now."""
        with self._lock:
            self._read()

    def get(self, strings: tuple[str, ...]) -> StopStrings:
        """The stop strings of this list. The first call of all reads the vocabulary."""
        with self._lock:
            stops = self._made.pop(strings, None)
            if stops is None:
                stops = StopStrings(strings, self._read())
            self._made[strings] = stops
            if len(self._made) > _CACHED_SETS:
                self._made.popitem(last=False)
            return stops

    def _read(self) -> TokenTexts:
        if self._texts is None:
            self._texts = token_texts(*self._vocabulary)
        return self._texts


def token_texts(inner: tokenizers.Tokenizer, skipped_ids: frozenset[int], vocab_size: int) -> TokenTexts:
    """The texts of a tokenizer's first `vocab_size` ids, as its decoder gives them."""
    spelled = [None if i in skipped_ids else inner.id_to_token(i) for i in range(vocab_size)]
    if isinstance(inner.decoder, tokenizers.decoders.ByteLevel):
        return JoinedTexts([None if token is None else bytes_of_token(token) for token in spelled])
    runs = np.array([BYTE_TOKEN.fullmatch(token or "") is not None for token in spelled], dtype=np.bool_)
    steps = _steps(inner.decoder)
    tokens = _joined_tokens(inner, spelled, runs) if _joins(steps) else None
    if tokens is None:
        return WindowTexts(inner, spelled, runs)
    return JoinedTexts(tokens, runs, strips=steps[-1]["type"] == "Strip")


def _joined_tokens(
    inner: tokenizers.Tokenizer, spelled: list[str | None], runs: NDArray[np.bool_]
) -> list[bytes | None] | None:
    """The bytes of each token, decoded behind another one, or None if none of them has a text."""
    plain = [i for i, token in enumerate(spelled) if token is not None and not runs[i]]
    first = next((i for i in plain if inner.decode([i], skip_special_tokens=False)), None)
    if first is None:
        return None
    before = len(inner.decode([first], skip_special_tokens=False))
    tokens = [
        None if token is None else bytes.fromhex(token[3:5]) if run else b""
        for token, run in zip(spelled, runs, strict=True)
    ]
    pairs = inner.decode_batch([[first, i] for i in plain], skip_special_tokens=False)
    for i, text in zip(plain, pairs, strict=True):
        tokens[i] = text[before:].encode()
    return tokens


_JOINING = re.compile(r"(Replace )*ByteFallback (Fuse (Strip )?)?")


def _joins(steps: list[dict[str, Any]]) -> bool:
    """Whether a decoder joins the texts of tokens as they are, but for runs of bytes and a space before it all."""
    return (
        _JOINING.fullmatch("".join(f"{step['type']} " for step in steps)) is not None
        and all(not step["pattern"].get("String", "").isascii() for step in steps if step["type"] == "Replace")
        and all(
            (step["content"], step["start"], step["stop"]) == (" ", 1, 0) for step in steps if step["type"] == "Strip"
        )
    )


def _steps(decoder: Any) -> list[dict[str, Any]]:
    state: dict[str, Any] = {} if decoder is None else json.loads(decoder.__getstate__())
    return state.get("decoders", [])


def _common_length(one: str, other: str) -> int:
    """Of the beginning that two texts share."""
    if other.startswith(one):
        return len(one)
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _backwards(token_ids: NDArray[np.int32]) -> Iterator[int]:
    """The last first, without a copy of them all."""
    for end in range(token_ids.size, 0, -_CHUNK):
        yield from reversed(token_ids[max(0, end - _CHUNK) : end].tolist())


def _text_of_run(run: list[bytes]) -> bytes:
    """The text of byte tokens, given last first."""
    data = b"".join(reversed(run))
    try:
        data.decode()
    except UnicodeDecodeError:
        return _REPLACEMENT.encode() * len(run)
    return data


def _without_torn(data: bytes, most: int) -> bytes:
    """`data` without the end of a character at its start, `most` bytes at most."""
    start = 0
    while start < most and data[start] & 0xC0 == 0x80:
        start += 1
    return data[start:]
