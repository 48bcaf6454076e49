"""Which rows a step's tokens may have brought to a stop string, for all rows in one look-up."""

from __future__ import annotations

import numpy as np

from gapless.plan import Ints
from gapless.request import StopTexts


class StopTable:
    """A line for each set of stop strings that a row has: which tokens can be the last of one. Line 0 is of none."""

    def __init__(self) -> None:
        self._could_LV = np.zeros((1, 1), dtype=np.bool_)  # the last column is for all tokens beyond a tokenizer's
        self._lines: dict[StopTexts, int] = {}
        self._users: dict[int, int] = {}  # rows that have a line
        self._free: list[int] = []

    def take(self, stops: StopTexts | None) -> int:
        """The line for one row more."""
        if stops is None:
            return 0
        line = self._lines.get(stops)
        if line is None:
            line = self._lines[stops] = self._new_line(stops.candidates.size + 1)
            self._could_LV[line] = False
            self._could_LV[line, : stops.candidates.size] = stops.candidates
            self._users[line] = 0
        self._users[line] += 1
        return line

    def release(self, stops: StopTexts | None) -> None:
        """A row does not need its line any more."""
        if stops is None:
            return
        line = self._lines[stops]
        self._users[line] -= 1
        if not self._users[line]:
            del self._users[line], self._lines[stops]
            self._free.append(line)

    def hits(self, lines_E: Ints, tokens_E: Ints) -> list[int]:
        """The entries whose token can be the last of one of their stop strings."""
        columns_E = np.minimum(tokens_E, self._could_LV.shape[1] - 1)
        return np.flatnonzero(self._could_LV[lines_E, columns_E]).tolist()

    @property
    def num_lines(self) -> int:
        """Sets of stop strings in use."""
        return len(self._lines)

    def _new_line(self, width: int) -> int:
        if self._free:
            return self._free.pop()
        lines, columns = self._could_LV.shape
        grown = np.zeros((2 * lines, max(width, columns)), dtype=np.bool_)
        grown[:lines, : columns - 1] = self._could_LV[:, :-1]
        self._could_LV = grown
        self._free = list(range(2 * lines - 1, lines, -1))
        return lines
