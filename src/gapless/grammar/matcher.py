"""A compiled grammar, and where one sequence stands in it.

What the library finds out of a prefix it keeps for the next, and copies of a compiled grammar share it. They also share
a lock and a limit: so a grammar has several compiled forms and gives them out in turn, and a sequence whose shared part
hits a limit goes on with one of its own. Only what it can not do alone is its error.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from gapless.errors import InvalidRequestError
from gapless.grammar.lines import advance, fill_lines, library_threads
from gapless.grammar.vocabulary import WORD_BITS, Vocabulary

Ids = Sequence[int] | NDArray[np.int32]

QUICK: Final = 0.02  # seconds; a grammar that takes longer is compiled once only
SHARES: Final = max(1, min(8, os.cpu_count() or 1))
ENDLESS: Final = 2**62
"""min_tokens of a sequence that is to end only where the grammar allows nothing else, as with ignore_eos."""
_ERROR_LENGTH: Final = 300


@dataclass(frozen=True, slots=True, eq=False)
class StopBits:
    """The stop ids of some sequences as bits, in the words that have one of them or the library's end token.

    columns  which words; their bits are cleared first, and those of `ends` set where a sequence may end.
    end_id   the library's end token, whose bit says whether the text is complete.
    """

    end_id: int
    columns: NDArray[np.intp]
    cleared: NDArray[np.uint32]
    ends: NDArray[np.uint32]


class Matcher:
    """Where one sequence stands. It advances by accepted tokens only, so it outlives preemption.

    One thread at a time: not while fill_many() runs on another, but for `error` and `ended`.

    error  why nothing more can be generated; its line of the mask is all zero. None as long as it can.
    ended  a stop id was accepted.
    """

    def __init__(
        self, grammar: Grammar, shared: LLMatcher, stops: StopBits, stop_ids: frozenset[int], least: int
    ) -> None:
        self._grammar = grammar
        self._shared: LLMatcher | None = shared
        self._stop_ids = stop_ids
        self._least = least
        self._tokens: list[int] = []
        self.inner = shared.deep_copy()
        self.stops = stops
        self.error: str | None = None
        self.ended = False

    @property
    def accepting(self) -> bool:
        """Whether the text so far is complete: the sequence may end here."""
        return self.ended or (self.error is None and self.inner.is_accepting())

    @property
    def may_end(self) -> bool:
        """Whether it has as many tokens as it must; not what the grammar says."""
        return len(self._tokens) >= self._least

    @property
    def open(self) -> bool:
        """Whether there is a state that can advance: neither ended nor failed."""
        return self.error is None and not self.ended

    @property
    def beginnings(self) -> NDArray[np.uint32] | None:
        """The tokens it may begin with, where that is a matter of the decoder."""
        return None if self._tokens else self._grammar.vocabulary.first_W

    def accept(self, token_id: int) -> None:
        """Advance by a token that was sampled under this matcher's mask. A wrong one sets `error`."""
        if self.note(token_id):
            self.advanced(self.inner.consume_token(token_id))

    def fill(self, mask_W: NDArray[np.int32]) -> None:
        """Write which tokens may follow: bit t % 32 of word t // 32."""
        fill_lines([(self, 0)], mask_W[None, :], None)

    @staticmethod
    def fill_many(
        accepts: Sequence[tuple[Matcher, int]], fills: Sequence[tuple[Matcher, int]], mask_MW: NDArray[np.int32]
    ) -> None:
        """Advance by `accepts`, in their order, then fill each matcher's line of mask_MW. Other lines stay as they are.

        The library works on threads of its own meanwhile, and Python's lock is free but for the bookkeeping.
        """
        executor = library_threads()
        advance(accepts, executor)
        fill_lines(fills, mask_MW, executor)

    def note(self, token: int) -> bool:
        """Take a token in; whether the grammar's state has to consume it, too. Then advanced() must follow."""
        if self.error is not None:
            return False
        if self.ended:
            self.error = f"token {token} came after the end"
        elif token in self._stop_ids:
            self.ended = True
        elif not 0 <= token < self._grammar.vocabulary.size:
            self.error = f"token {token} is outside the vocabulary"
        else:
            self._tokens.append(token)
            return True
        return False

    def advanced(self, consumed: bool) -> None:
        """What consuming the last token brought."""
        if not consumed and not self.on_its_own():
            self.error = self.reason()

    def on_its_own(self) -> bool:
        """Come back from an error of what is shared with other sequences. False if it is this sequence's own."""
        shared, self._shared = self._shared, None
        if shared is None or "lexer error" not in self.inner.get_error():
            return False
        self._grammar.replace(shared)
        if self._grammar.spoiled:
            return False
        own = self._grammar.build()
        if not own.consume_tokens(self._tokens):
            return False
        own.compute_bitmask()
        if own.is_error():
            return False
        self.inner = own
        return True

    def reason(self) -> str:
        """The library's words for its error."""
        return short(self.inner.get_error()) or "the grammar allows no token here"


class Grammar:
    """A grammar that was compiled for a model. Safe to share between threads.

    build    compiles it once more.
    seconds  how long that took.
    spoiled  a limit was hit in what its sequences share, and it takes too long to compile it again in a step.
    """

    def __init__(
        self, build: Callable[[], LLMatcher], first: LLMatcher, seconds: float, vocabulary: Vocabulary, stop_ids: Ids
    ) -> None:
        self.build = build
        self.seconds = seconds
        self.vocabulary = vocabulary
        self.spoiled = False
        self._stop_ids = stop_ids
        self._shared = [first, *(build() for _ in range(SHARES - 1 if seconds <= QUICK else 0))]
        self._turns = itertools.count()

    @property
    def shares(self) -> int:
        """How many compiled forms its sequences get in turn."""
        return len(self._shared)

    def matcher(self, *, min_tokens: int = 0, stop_ids: Ids | None = None) -> Matcher:
        """The state of a new sequence; takes microseconds.

        min_tokens  until there are so many, stop ids are left out unless nothing else is allowed. ENDLESS: always.
        stop_ids    the ids that end this sequence; None: the model's. With ignore_eos give the model's, too, since
                    nothing else may follow where the grammar ends.
        Raises InvalidRequestError if there are none.
        """
        ids = self._stop_ids if stop_ids is None else stop_ids
        inside = tuple(sorted({int(i) for i in ids if 0 <= i < self.vocabulary.size}))
        if not inside:
            raise InvalidRequestError("a request with a grammar needs a stop token; give one in stop_token_ids")
        shared = self._shared[next(self._turns) % len(self._shared)]
        return Matcher(self, shared, _stop_bits(inside, self.vocabulary.end_id), frozenset(inside), min_tokens)

    def replace(self, shared: LLMatcher) -> None:
        """Give this compiled form to no further sequence: it has hit a limit."""
        if self.seconds > QUICK:
            self.spoiled = True
            return
        fresh = self.build()
        self._shared = [fresh if each is shared else each for each in self._shared]


def short(message: str) -> str:
    """An error of the library without the state and the grammar behind it, on one line."""
    for mark in ("<state>", "<non-verbose/>", "<grammar>"):
        message = message.partition(mark)[0]
    line = " ".join(message.split())
    return line if len(line) <= _ERROR_LENGTH else line[: _ERROR_LENGTH - 1] + "…"


@lru_cache(maxsize=256)
def _stop_bits(ids: tuple[int, ...], end_id: int) -> StopBits:
    columns = np.unique(np.array([*ids, end_id], dtype=np.intp) // WORD_BITS)
    where = {int(column): at for at, column in enumerate(columns)}
    ends = np.zeros(columns.size, dtype=np.uint32)
    for i in ids:
        ends[where[i // WORD_BITS]] |= np.uint32(1 << i % WORD_BITS)
    cleared = ends.copy()
    cleared[where[end_id // WORD_BITS]] |= np.uint32(1 << end_id % WORD_BITS)
    return StopBits(end_id, columns, cleared, ends)
