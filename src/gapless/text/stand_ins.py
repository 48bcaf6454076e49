"""Keeps special tokens that a user spells out apart from those that a chat template writes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

_PRIVATE_USE = range(0xF0000, 0x10FFFE)  # two planes of characters that no script uses


class StandIns:
    """Hides what matches `pattern` behind single characters that are in none of the `texts`, and brings it back."""

    def __init__(self, pattern: re.Pattern[str], texts: Iterable[str]) -> None:
        self._pattern = pattern
        self._texts = texts
        self._free: Iterator[str] | None = None
        self.hidden: dict[str, str] = {}  # what was hidden -> its stand-in

    def hide(self, text: str) -> str:
        """`text` with its matches replaced."""
        return self._pattern.sub(self._stand_in, text)

    def restore(self, text: str) -> str:
        """`text` with the matches back in their places."""
        return text.translate({ord(character): special for special, character in self.hidden.items()})

    def _stand_in(self, match: re.Match[str]) -> str:
        if match[0] not in self.hidden:
            if self._free is None:
                used = set[str]().union(*self._texts)
                self._free = (chr(point) for point in _PRIVATE_USE if chr(point) not in used)
            self.hidden[match[0]] = next(self._free)
        return self.hidden[match[0]]


def all_texts(data: object) -> Iterator[str]:
    """Every text within nested lists and objects, keys included."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from all_texts(key)
            yield from all_texts(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from all_texts(value)
