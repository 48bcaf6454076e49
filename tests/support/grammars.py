"""Walks through grammars, and what their masks allow."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gapless.grammar.matcher import Matcher
from gapless.text.tokenizer import Tokenizer

V = 49152
STOPS = (2, 0)


def line(words: int = V // 32) -> NDArray[np.int32]:
    """A line with rubbish in it."""
    return np.full(words, 0x5A5A5A5A, dtype=np.int32)


def ids_of(mask_W: NDArray[np.int32]) -> list[int]:
    """The tokens that a line allows."""
    return np.flatnonzero(np.unpackbits(mask_W.astype("<i4").view(np.uint8), bitorder="little")).tolist()


def allowed(matcher: Matcher, words: int = V // 32) -> list[int]:
    mask_W = line(words)
    matcher.fill(mask_W)
    return ids_of(mask_W)


class Walker:
    """Random tokens under a matcher's mask. `closing` are preferred, so often as `haste` says."""

    def __init__(self, tokenizer: Tokenizer, seed: int, haste: float = 0.0, closing: str = '"}],:0123456789') -> None:
        self._rng = random.Random(seed)
        self._haste = haste
        self._tokenizer = tokenizer
        self._closing = frozenset(
            i for i in range(tokenizer.vocab_size) if (text := tokenizer.decode([i])) and set(text) <= set(closing)
        )

    def walk(self, matcher: Matcher, most: int, stops: Sequence[int] = STOPS) -> tuple[list[int], bool]:
        """Up to `most` tokens, without the stop, and whether there was one."""
        tokens: list[int] = []
        while len(tokens) < most:
            token = self._choose(allowed(matcher), stops)
            assert matcher.error is None, matcher.error
            matcher.accept(token)
            if token in stops:
                assert matcher.ended
                return tokens, True
            tokens.append(token)
        return tokens, False

    def _choose(self, ids: list[int], stops: Sequence[int]) -> int:
        if self._rng.random() < self._haste:
            ends = [i for i in ids if i in stops]
            better = ends or [i for i in ids if i in self._closing]
            if better:
                return self._rng.choice(better)
        return self._rng.choice(ids)
