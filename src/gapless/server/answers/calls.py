"""Reads one call of a function as models write it: an object with its name and its arguments."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

from gapless.server.answers.json_scan import SPACE, JsonScanner

_ARGUMENTS: Final = ("arguments", "parameters")
KEYS: Final = ("name", *_ARGUMENTS, "type", "id")
"""What the first member of a call's object may be."""


class CallReader:
    """`{"name": "f", "arguments": {...}}`, in parts. "parameters" is another word for "arguments", other members are
    left out, and arguments that are an object written into a text are that object.

    name      of the function, as soon as its arguments come; None before.
    complete  the arguments are.
    done      the object is.
    broken    what follows makes no call, or is no JSON.
    """

    def __init__(self, knows: Callable[[str], bool], *, needs_arguments: bool) -> None:
        """knows  whether a function of this name may be called.

        needs_arguments  an object without any makes no call; else it is a call with none.
        """
        self.name: str | None = None
        self.complete = self.done = self.broken = False
        self._knows = knows
        self._needs_arguments = needs_arguments
        self._step: Callable[[str, int], int] = self._open
        self._scanner: JsonScanner | None = None  # of the value or key that is being read
        self._held: list[str] = []
        self._value: list[str] = []
        self._key = ""
        self._found_name: str | None = None
        self._found_arguments: str | None = None
        self._found: list[str] = []

    @property
    def held(self) -> str:
        """What was read before there was a name, or after the arguments were complete."""
        return "".join(self._held)

    def feed(self, text: str, at: int) -> tuple[int, str]:
        """Go on from text[at]. Returns where it stopped, as JsonScanner.feed() does, and what it found of arguments."""
        self._found = []
        while at < len(text) and not self.done and not self.broken:
            space = SPACE.match(text, at).end() if self._scanner is None else at  # pyright: ignore[reportOptionalMemberAccess]
            if space > at:
                self._held.append(text[at:space])
                at = space
                continue
            step = self._step
            after = step(text, at)
            if after == at and self._step == step:
                break
            at = after
        return at, "".join(self._found)

    def _open(self, text: str, at: int) -> int:
        return self._sign(text, at, "{", self._first_key)

    def _first_key(self, text: str, at: int) -> int:
        return self._end(text, at) if text[at] == "}" else self._next_key(text, at)

    def _next_key(self, text: str, at: int) -> int:
        if text[at] != '"':
            self.broken = True
            return at
        return self._scan(self._key_text)(text, at)

    def _key_text(self, text: str, at: int) -> int:
        after = self._scanned(text, at)
        if self._scanner is None:
            self._key = "".join(self._value)[1:-1]
            self._step = self._colon
            if self.name is None and self._key not in KEYS:
                self.broken = True
        return after

    def _colon(self, text: str, at: int) -> int:
        return self._sign(text, at, ":", self._begin_value)

    def _begin_value(self, text: str, at: int) -> int:
        if self.name is None and self._found_name is not None and self._key in _ARGUMENTS and text[at] == "{":
            self._begin(self._found_name)
            return self._scan(self._stream)(text, at)
        return self._scan(self._value_text)(text, at)

    def _value_text(self, text: str, at: int) -> int:
        after = self._scanned(text, at)
        if self._scanner is None:
            self._step = self._comma
            if self.name is None:
                self._take("".join(self._value))
        return after

    def _stream(self, text: str, at: int) -> int:
        assert self._scanner is not None
        after = self._scanner.feed(text, at)
        self._found.append(text[at:after])
        self.broken = self._scanner.broken
        if self._scanner.done:
            self._scanner, self.complete, self._step = None, True, self._comma
        return after

    def _comma(self, text: str, at: int) -> int:
        return self._end(text, at) if text[at] == "}" else self._sign(text, at, ",", self._next_key)

    def _end(self, text: str, at: int) -> int:
        if not self.complete and self._found_name is not None and not self._needs_arguments:
            self._begin(self._found_name)
            self._found.append("{}")
            self.complete = True
        self.done = self.complete
        self.broken = not self.done
        return at + 1 if self.done else at

    def _sign(self, text: str, at: int, sign: str, then: Callable[[str, int], int]) -> int:
        if text[at] != sign:
            self.broken = True
            return at
        self._held.append(sign)
        self._step = then
        return at + 1

    def _scan(self, step: Callable[[str, int], int]) -> Callable[[str, int], int]:
        self._scanner, self._value, self._step = JsonScanner(), [], step
        return step

    def _scanned(self, text: str, at: int) -> int:
        """Read more of what `_value` gathers; when it is whole there is no scanner any more."""
        assert self._scanner is not None
        after = self._scanner.feed(text, at)
        self._value.append(text[at:after])
        self._held.append(text[at:after])
        self.broken = self._scanner.broken
        if self._scanner.done:
            self._scanner = None
        return after

    def _take(self, value: str) -> None:
        """A whole member, before the call has begun."""
        if self._key == "name":
            name = json.loads(value) if value[0] == '"' else None
            self._found_name = name
            self.broken = name is None or not self._knows(name)
        elif self._key in _ARGUMENTS:
            self._found_arguments = _object_of(value)
            self.broken = self._found_arguments is None
        if self._found_name is not None and self._found_arguments is not None and not self.broken:
            self._begin(self._found_name)
            self._found.append(self._found_arguments)
            self.complete = True

    def _begin(self, name: str) -> None:
        self.name = name
        self._held = []


def _object_of(value: str) -> str | None:
    """A call's arguments from a JSON value; None if it is none that they can be."""
    if value[0] == "{":
        return value
    if value == "null":
        return "{}"
    if value[0] != '"':
        return None
    inner: str = json.loads(value)
    scanner = JsonScanner()
    end = scanner.feed(inner, 0)
    return inner if scanner.done and not inner[end:].strip() and inner.strip().startswith("{") else None
