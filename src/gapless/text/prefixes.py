"""Which of some strings a text may be about to spell."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence


class Prefixes:
    """Which beginning of one of the strings a text ends with, in constant time per character.

    A state is such a beginning, the longest that is not the whole of all strings that begin so; 0 the empty one.
    depth[state] is its length.
    Source: Aho and Corasick, Efficient string matching: an aid to bibliographic search (1975).
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.depth = [0]
        self._next: list[dict[str, int]] = [{}]
        for string in strings:
            state = 0
            for length, character in enumerate(string, start=1):
                state = self._next[state].setdefault(character, len(self.depth))
                if state == len(self.depth):
                    self.depth.append(length)
                    self._next.append({})
        self._fallback = [0] * len(self.depth)  # the longest other beginning that a state ends with
        self._settled = [0] * len(self.depth)  # of a state that nothing can follow, such a one that something can
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            self._settled[state] = state if self._next[state] else self._settled[self._fallback[state]]
            for character, following in self._next[state].items():
                self._fallback[following] = self._step(self._fallback[state], character)
                waiting.append(following)
        self._first = re.compile(f"[{re.escape(''.join(self._next[0]))}]")

    def read(self, state: int, text: str) -> int:
        """The state after `text`."""
        at = 0
        while at < len(text):
            if not state:
                match = self._first.search(text, at)
                if match is None:
                    return 0
                at = match.start()
            state = self._settled[self._step(state, text[at])]
            at += 1
        return state

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)
