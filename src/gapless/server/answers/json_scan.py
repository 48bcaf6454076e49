"""Reads one JSON value that comes in parts, and says how far it is valid."""

from __future__ import annotations

import re
from typing import Final, Literal

MAX_DEPTH: Final = 128
MAX_SCALAR: Final = 1024  # characters of a number

SPACE: Final = re.compile(r"[ \t\n\r]*")
_CHARACTERS: Final = re.compile(r'(?:[^"\\\x00-\x1f]+|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
_PART_OF_ESCAPE: Final = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_WORD: Final = re.compile(r"[A-Za-z0-9+.\-]*")
_SCALAR: Final = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")

_Next = Literal["value", "first item", "first key", "key", "colon", "comma"]


class JsonScanner:
    """Where a JSON value stands.

    done    it is complete.
    broken  what follows can not be part of it.
    """

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._closers: list[str] = []
        self._next: _Next = "value"
        self._in_string = False

    def feed(self, text: str, at: int) -> int:
        """Go on from text[at]. Returns where it stopped: behind the value, before what breaks it, or before the
        beginning of an escape or a number that needs more text; give that again, with what follows."""
        while at < len(text) and not self.done and not self.broken:
            after = self._string(text, at) if self._in_string else self._token(text, at)
            if after == at:
                break
            at = after
        return at

    def _string(self, text: str, at: int) -> int:
        end = _CHARACTERS.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        if end == len(text):
            return end
        if text[end] == '"':
            self._in_string = False
            if self._next != "colon":
                self._behind_value()
            return end + 1
        if not _PART_OF_ESCAPE.fullmatch(text, end):
            self.broken = True
        return end

    def _token(self, text: str, at: int) -> int:
        space = SPACE.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        if space > at:
            return space
        char, expected = text[at], self._next
        if expected == "colon" and char == ":":
            self._next = "value"
        elif expected == "comma" and char == ",":
            self._next = "key" if self._closers[-1] == "}" else "value"
        elif (expected in ("comma", "first item", "first key")) and char == self._closers[-1]:
            self._closers.pop()
            self._behind_value()
        elif expected in ("key", "first key") and char == '"':
            self._in_string, self._next = True, "colon"
        elif expected in ("value", "first item"):
            return self._value(text, at)
        else:
            self.broken = True
            return at
        return at + 1

    def _value(self, text: str, at: int) -> int:
        char = text[at]
        if char == '"':
            self._in_string, self._next = True, "comma"
            return at + 1
        if char in "{[":
            if len(self._closers) == MAX_DEPTH:
                self.broken = True
                return at
            self._closers.append("}" if char == "{" else "]")
            self._next = "first key" if char == "{" else "first item"
            return at + 1
        end = _WORD.match(text, at, at + MAX_SCALAR).end()  # pyright: ignore[reportOptionalMemberAccess]
        if end == len(text) and end > at:
            return at
        if not _SCALAR.fullmatch(text, at, end):
            self.broken = True
            return at
        self._behind_value()
        return end

    def _behind_value(self) -> None:
        self._next = "comma"
        self.done = not self._closers
