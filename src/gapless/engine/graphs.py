"""Captured decode steps: one graph per bucket and slot, all in the device's one memory pool."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from gapless.device.base import Graph
from gapless.engine.layout import StepShape
from gapless.engine.slots import Slot

_FINE = 8  # buckets are multiples of this up to _FINE_UNTIL, then an eighth of their power of two apart
_FINE_UNTIL = 64


def default_buckets(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, …, 64, then steps of an eighth of the next power of two; the last is max_rows."""
    sizes = [1, 2, 4, *range(_FINE, _FINE_UNTIL + 1, _FINE)]
    power = _FINE_UNTIL
    while power < max_rows:
        sizes.extend(range(power + power // 4, 2 * power + 1, power // 4))
        power *= 2
    return (*[size for size in sizes if size < max_rows], max_rows)


class GraphTable:
    """Graphs by (bucket, slot); empty where graphs are off."""

    def __init__(self, buckets: tuple[int, ...]) -> None:
        self.buckets = tuple(sorted(set(buckets)))
        self._graphs: dict[tuple[StepShape, int], Graph] = {}

    def bucket_for(self, rows: int) -> int | None:
        """The smallest bucket that holds this many rows, or None."""
        index = bisect_left(self.buckets, rows)
        return self.buckets[index] if index < len(self.buckets) else None

    def get(self, shape: StepShape, slot: Slot) -> Graph | None:
        return self._graphs.get((shape, slot.index))

    def capture(self, slots: list[Slot], capture: Callable[[Slot, StepShape], Graph]) -> None:
        """Capture every bucket for every slot, largest first so that the smaller ones reuse its memory."""
        for bucket in reversed(self.buckets):
            shape = StepShape.decode(bucket)
            for slot in slots:
                self._graphs[shape, slot.index] = capture(slot, shape)

    def clear(self) -> None:
        """Give the graphs and their memory back."""
        self._graphs.clear()
