"""Lines of a mask: which tokens may follow in each of many sequences, with a few calls into the library for all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLExecutor
from numpy.typing import NDArray

from gapless.grammar.vocabulary import WORD_BITS

if TYPE_CHECKING:
    from gapless.grammar.matcher import Matcher


@cache
def library_threads() -> LLExecutor:
    """Most of the machine's cores, 32 at most."""
    return LLExecutor()


def advance(accepts: Sequence[tuple[Matcher, int]], executor: LLExecutor) -> None:
    """Each matcher by its tokens, in order."""
    left = list(accepts)
    while left:
        turn: dict[Matcher, int] = {}
        later: list[tuple[Matcher, int]] = []
        for matcher, token in left:
            if matcher in turn:
                later.append((matcher, token))
            else:
                turn[matcher] = token
        moving = [(matcher, token) for matcher, token in turn.items() if matcher.note(token)]
        if moving:
            consumed = executor.consume_token_par([(matcher.inner, token) for matcher, token in moving])
            for (matcher, _), each in zip(moving, consumed, strict=True):
                matcher.advanced(each)
        left = later


def fill_lines(fills: Sequence[tuple[Matcher, int]], mask_MW: NDArray[np.int32], executor: LLExecutor | None) -> None:
    """The line of each matcher; without an executor one after the other on this thread."""
    if not fills:
        return
    bits_MW = mask_MW.view(np.uint32)
    for matcher, line in fills:
        if not matcher.open:
            bits_MW[line] = 0
    open_fills = [(matcher, line) for matcher, line in fills if matcher.open]
    if open_fills:
        _ask(open_fills, mask_MW, executor)
        for matcher, line in open_fills:
            if matcher.inner.is_error():
                _retry(matcher, mask_MW[line])
    groups: dict[int, list[tuple[Matcher, int]]] = {}
    for matcher, line in fills:
        if matcher.error is None:
            groups.setdefault(id(matcher.stops), []).append((matcher, line))
    for group in groups.values():
        _set_stops(group, bits_MW)


def _ask(fills: Sequence[tuple[Matcher, int]], mask_MW: NDArray[np.int32], executor: LLExecutor | None) -> None:
    width = mask_MW.shape[1] * mask_MW.itemsize
    pairs = [(matcher.inner, line) for matcher, line in fills]
    if executor is not None:
        executor.unsafe_compute_mask_ptr(pairs, mask_MW.ctypes.data, width, mask_MW.shape[0])
        return
    for inner, line in pairs:
        inner.unsafe_compute_mask_ptr(mask_MW[line].ctypes.data, width)


def _retry(matcher: Matcher, line_W: NDArray[np.int32]) -> None:
    """The library fills a failed matcher's line with the end alone; it must not pass for a complete text."""
    reason = matcher.reason()
    if matcher.on_its_own():
        matcher.inner.unsafe_compute_mask_ptr(line_W.ctypes.data, line_W.nbytes)
    else:
        matcher.error = reason
        line_W[:] = 0


def _set_stops(group: list[tuple[Matcher, int]], bits_MW: NDArray[np.uint32]) -> None:
    """Stop ids where a sequence may end, in the lines of matchers with the same stop ids."""
    stops = group[0][0].stops
    lines = np.array([line for _, line in group], dtype=np.intp)
    ended = np.array([matcher.ended for matcher, _ in group], dtype=np.bool_)
    enough = np.array([matcher.may_end for matcher, _ in group], dtype=np.bool_)
    complete = (bits_MW[lines, stops.end_id // WORD_BITS] >> np.uint32(stops.end_id % WORD_BITS)) & np.uint32(1) != 0
    complete |= ended
    places = (lines[:, None], stops.columns)
    kept = bits_MW[places] & ~stops.cleared
    bits_MW[places] = kept | np.where((complete & enough | ended)[:, None], stops.ends, np.uint32(0))
    for matcher, line in group:
        if matcher.beginnings is not None:
            bits_MW[line] &= matcher.beginnings
    low, high = int(lines.min()), int(lines.max()) + 1
    empty = np.bitwise_or.reduce(bits_MW[low:high], axis=1)[lines - low] == 0
    for at in np.flatnonzero(empty).tolist():
        matcher, line = group[at]
        if complete[at]:
            bits_MW[line, stops.columns] = stops.ends
        else:
            matcher.error = "the grammar allows only tokens here that end the request or can not begin a text"
