"""Stop strings: the engine finds them in tokens, the front end cuts the text at them, and both agree.

A request ends with the first token after which decode() of its generated tokens contains one of its stop strings. If
several are there, the one that begins first counts, and of those the first in the list. Special tokens have no text,
so a stop string may span them. An incomplete character counts as what decode() shows for it, U+FFFD: that matters only
to a stop string with U+FFFD in it.
"""

from __future__ import annotations

import json
import re
import threading
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from gapless.text.detokenize import BYTE_TOKEN, Detokenizer, bytes_of_token

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
        """Which of the strings the text of these generated tokens contains since its last token; None if none.

        To be asked after each candidate. The cost grows with the longest string, not with the number of tokens; only
        a run of byte tokens like <0xE4> has to be read as a whole.
        """
        found = self.find(self._texts.tail(token_ids, self._size))
        return None if found is None else found[1]

    def find(self, text: str) -> tuple[int, int] | None:
        """Where in `text` which string begins first; at the same place, the first in the list."""
        found = [(at, index) for index, string in enumerate(self.strings) if (at := text.find(string)) >= 0]
        return min(found, default=None)

    def cut(self, text: str, *, include: bool = False) -> str:
        """`text` up to the first stop string, or up to its end with `include`; all of it if there is none."""
        found = self.find(text)
        if found is None:
            return text
        at, index = found
        return text[: at + len(self.strings[index])] if include else text[:at]


class StopFilter:
    """A detokenizer that ends its text at a stop string. The pieces add up to cut() of all the text.

    It holds back the longest tail that may still become a stop string. After a stop string it drops what is pushed,
    and decides with flush(): a stop string that begins earlier may end in the text that flush() brings.
    Linear in the text.
    """

    def __init__(self, inner: Detokenizer, stops: StopStrings, *, include: bool = False) -> None:
        self._inner = inner
        self._stops = stops
        self._include = include
        self._held = ""
        self._state = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these further ids make certain, and that belongs to no stop string."""
        prefixes = self._stops.prefixes
        if prefixes.complete[self._state]:
            return ""
        new = self._inner.push(token_ids)
        self._state, read = prefixes.read(self._state, new)
        text = self._held + new
        certain = len(self._held) + read - prefixes.depth[self._state]
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The rest, up to the stop string if there is one."""
        return self._stops.cut(self._held + self._inner.flush(), include=self._include)


class Prefixes:
    """How long a prefix of one of the strings a text ends with, in constant time per character.

    A state is such a prefix, 0 the empty one; depth[state] is its length, complete[state] whether a string ends there.
    Source: Aho and Corasick, Efficient string matching: an aid to bibliographic search (1975).
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.depth = [0]
        self.complete = [False]
        self._next: list[dict[str, int]] = [{}]
        for string in strings:
            state = 0
            for length, character in enumerate(string, start=1):
                state = self._next[state].setdefault(character, len(self.depth))
                if state == len(self.depth):
                    self.depth.append(length)
                    self.complete.append(False)
                    self._next.append({})
            self.complete[state] = True
        self._fallback = [0] * len(self.depth)  # the longest other prefix that a state ends with
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, following in self._next[state].items():
                fallback = self._fallback[following] = self._step(self._fallback[state], character)
                self.complete[following] |= self.complete[fallback]
                waiting.append(following)
        self._first = re.compile(f"[{re.escape(''.join(self._next[0]))}]")

    def read(self, state: int, text: str) -> tuple[int, int]:
        """The state after `text`, and how much of it was read: up to the first end of a string."""
        at = 0
        while at < len(text) and not self.complete[state]:
            if not state:
                match = self._first.search(text, at)
                if match is None:
                    return 0, len(text)
                at = match.start()
            state = self._step(state, text[at])
            at += 1
        return state, at

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)


class TokenTexts(Protocol):
    """What stop strings have to know of a vocabulary. Immutable, so that the engine's thread may read it any time."""

    def candidates(self, strings: Sequence[str]) -> NDArray[np.bool_]:
        """bool[V]: the tokens that can be the last of one of the strings. May say yes too often, never no."""
        ...

    def tail(self, token_ids: NDArray[np.int32], size: int) -> str:
        """The end of decode(): all that changed with the last token, and `size` bytes before it or more."""
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

    def tail(self, token_ids: NDArray[np.int32], size: int) -> str:
        tokens, in_run = self._tokens, self._in_run
        parts: list[bytes] = []  # the last first, and that does not count for what is missing
        run: list[bytes] = []
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
                missing -= len(whole) if parts else 0
                parts.append(whole)
                run = []
            missing -= len(part) if parts else 0
            parts.append(part)
            if missing <= 0:
                break
        data = b"".join(reversed([*parts, _text_of_run(run)]))
        if missing <= 0:
            data = _without_torn(data, self._MARGIN)
        text = data.decode(errors="replace")
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

    def tail(self, token_ids: NDArray[np.int32], size: int) -> str:
        count = 8
        while True:
            ids = np.minimum(token_ids[-count:], self._runs.size)
            ids = ids[self._has_text[ids]]
            borders = np.flatnonzero(~self._runs[ids])  # a run is read as a whole, and so has none within
            whole = count >= token_ids.size
            if whole or borders.size:
                begin = 0 if whole else int(borders[0])
                last = int(borders[-1]) + 1 if borders.size else 0
                before = self._decode(ids[begin : min(last, ids.size - 1)])
                if whole or len(before) >= size + self._MARGIN:
                    return self._decode(ids[begin:])[0 if whole else self._MARGIN :]
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

    def get(self, strings: tuple[str, ...]) -> StopStrings:
        """The stop strings of this list. The first call of all reads the vocabulary."""
        with self._lock:
            stops = self._made.pop(strings, None)
            if stops is None:
                if self._texts is None:
                    self._texts = token_texts(*self._vocabulary)
                stops = StopStrings(strings, self._texts)
            self._made[strings] = stops
            if len(self._made) > _CACHED_SETS:
                self._made.popitem(last=False)
            return stops


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
