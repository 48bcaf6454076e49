"""Who goes next: by a seed, or by virtual time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Ready:
    """The head of a stream that may run now. Times are virtual seconds."""

    stream: int
    start: float


class Order(Protocol):
    """Decides which of the streams' heads runs next, and when the host goes on."""

    def pick(self, ready: Sequence[Ready], now: float) -> int | None:
        """Index in `ready` of what runs before the host's next action; None lets the host go on."""
        ...

    def must_pick(self, ready: Sequence[Ready]) -> int:
        """The same while the host waits for an event."""
        ...


class RandomOrder:
    """Any order, from a seed. The seed also chooses how far the device lags and which stream is slow.

    eagerness  chance that a ready piece of work runs before the host's next action: 1 is a device that is done at
               once, 0 one that does nothing until the host waits.
    """

    def __init__(self, seed: int, eagerness: float | None = None) -> None:
        self._random = random.Random(seed)
        self.eagerness = self._random.choice((0.0, 0.05, 0.3, 0.7, 1.0)) if eagerness is None else eagerness
        self._weights = [self._random.choice((0.05, 1.0, 1.0, 20.0)) for _ in range(8)]

    def pick(self, ready: Sequence[Ready], now: float) -> int | None:
        if self.eagerness == 0.0 or self._random.random() >= self.eagerness:
            return None
        return self.must_pick(ready)

    def must_pick(self, ready: Sequence[Ready]) -> int:
        if len(ready) == 1:
            return 0
        return self._random.choices(range(len(ready)), [self._weights[each.stream] for each in ready])[0]


class TimedOrder:
    """What starts first in virtual time."""

    def pick(self, ready: Sequence[Ready], now: float) -> int | None:
        first = self.must_pick(ready)
        return first if ready[first].start <= now else None

    def must_pick(self, ready: Sequence[Ready]) -> int:
        return min(range(len(ready)), key=lambda index: (ready[index].start, ready[index].stream))
