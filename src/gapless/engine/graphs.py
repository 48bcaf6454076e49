"""Captured steps: a graph per shape and slot, all in the device's one memory pool."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from gapless.device.base import Graph
from gapless.engine.layout import Edits, StepShape
from gapless.engine.slots import Slot
from gapless.plan import Plan

_FINE = 8  # buckets are multiples of this up to _FINE_UNTIL, then an eighth of their power of two apart
_FINE_UNTIL = 64

CHUNK_TOKENS = (64, 128, 256, 512, 768, 1024, 1536, 2048, 4096, 8192)  # each costs some 0.1 s of start-up
FEWEST_DECODES = 64  # as quick as fewer: the weights are read all the same
DECODES_APART = 4  # decodes of a mixed step are padded to that times a power of this
SHORT_CHUNK = 16  # tokens: a mixed step holds as many chunks as if all were so long


def default_buckets(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, …, 64, then steps of an eighth of the next power of two; the last is max_rows."""
    sizes = [1, 2, 4, *range(_FINE, _FINE_UNTIL + 1, _FINE)]
    power = _FINE_UNTIL
    while power < max_rows:
        sizes.extend(range(power + power // 4, 2 * power + 1, power // 4))
        power *= 2
    return (*[size for size in sizes if size < max_rows], max_rows)


def mixed_shapes(max_rows: int, max_tokens: int, max_updates: int) -> tuple[StepShape, ...]:
    """Steps that read prompts while up to max_rows decode: every mix of some numbers of decodes and, up to
    max_tokens, of tokens in chunks."""
    decodes = [FEWEST_DECODES]
    while decodes[-1] < max_rows:
        decodes.append(decodes[-1] * DECODES_APART)
    return tuple(
        mixed_shape(min(places, max_rows), tokens, tokens // SHORT_CHUNK, max_rows, max_updates)
        for places in decodes
        for tokens in CHUNK_TOKENS
        if tokens <= max_tokens
    )


@cache
def mixed_shape(decodes: int, chunk_tokens: int, chunks: int, max_rows: int, max_updates: int) -> StepShape:
    """A step of so many decodes and chunks, no more than max_rows of which sample or are new."""
    entries = decodes + min(chunks, max_rows)
    samples = min(entries, max_rows)
    return StepShape(decodes + chunk_tokens, decodes, entries, samples, max_updates, samples)


@dataclass(frozen=True, slots=True)
class StepGraphs:
    """The two halves of a captured step. The second reads memory that the first has written, and comes right after.

    whole  both, of a step that only decodes and edits nothing, which is most of them: a graph that comes after another
           one begins some 10 to 30 us late.
    """

    forward: Graph
    finish: Mapping[Edits, Graph]
    whole: Graph | None


class GraphTable:
    """Graphs by shape and slot; empty where graphs are off.

    buckets  numbers of rows of steps that only decode
    mixed    shapes of the others
    """

    def __init__(self, buckets: Sequence[int], mixed: Sequence[StepShape] = ()) -> None:
        self.buckets = tuple(sorted(set(buckets)))
        self.mixed = tuple(sorted(mixed, key=lambda shape: shape.tokens))
        self._graphs: dict[tuple[StepShape, int], StepGraphs] = {}

    @property
    def shapes(self) -> list[StepShape]:
        """All that are captured, the smallest first."""
        return sorted([*map(StepShape.decode, self.buckets), *self.mixed], key=lambda shape: shape.tokens)

    def bucket_for(self, rows: int) -> int | None:
        """The smallest bucket that holds this many rows, or None."""
        index = bisect_left(self.buckets, rows)
        return self.buckets[index] if index < len(self.buckets) else None

    def shape_for(self, plan: Plan) -> StepShape | None:
        """The smallest shape that holds the plan, or None."""
        if plan.decode_only:
            bucket = self.bucket_for(plan.rows_E.size)
            return None if bucket is None else StepShape.decode(bucket)
        exact = StepShape.of(plan)
        return next((shape for shape in self.mixed if _holds(shape, exact)), None)

    def pad_decodes(self, exact: StepShape) -> StepShape:
        """What a step that reads prompts runs in if no graph holds it: with as many decodes as one that does.

        Some kernels are compiled for the number of decodes, up to a power of two, and a running engine has no time.
        """
        if exact.decodes_only or not exact.decodes:
            return exact  # decodes alone are laid out in another way
        places = [shape.decodes for shape in self.mixed if shape.decodes >= exact.decodes]
        return exact.with_places(min(places)) if places else exact

    def get(self, shape: StepShape, slot: Slot) -> StepGraphs | None:
        return self._graphs.get((shape, slot.index))

    def capture(self, slots: Sequence[Slot], capture: Callable[[Slot, StepShape], StepGraphs]) -> None:
        """Capture every shape for every slot, largest first so that the smaller ones reuse its memory."""
        for shape in reversed(self.shapes):
            for slot in slots:
                self._graphs[shape, slot.index] = capture(slot, shape)

    def clear(self) -> None:
        """Give the graphs and their memory back."""
        self._graphs.clear()


def _holds(shape: StepShape, exact: StepShape) -> bool:
    return (
        shape.decodes >= exact.decodes
        and shape.chunk_tokens >= exact.chunk_tokens
        and shape.chunks >= exact.chunks
        and shape.samples >= exact.samples
        and shape.updates >= exact.updates
        and shape.admitted >= exact.admitted
    )
