"""The look-up of tokens that may complete a stop string, against the sets themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gapless.stop_table import StopTable

VOCAB = 7


@dataclass(frozen=True, eq=False)
class Texts:
    """Some stop strings that these tokens can end."""

    tokens: frozenset[int]

    @property
    def candidates(self) -> NDArray[np.bool_]:
        return np.isin(np.arange(VOCAB), list(self.tokens))

    def completes(self, token_ids: NDArray[np.int32]) -> int | None:
        raise NotImplementedError


SETS = [None, *(Texts(frozenset(tokens)) for tokens in ((), (0,), (6,), (1, 2), (0, 3, 5), range(VOCAB)))]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, len(SETS) - 1)), max_size=40))
def test_rows_that_come_and_go_find_the_tokens_of_their_own_strings(actions: list[tuple[bool, int]]):
    table, rows = StopTable(), list[tuple[int, Texts | None]]()
    for come, number in actions:
        if come:
            rows.append((table.take(SETS[number]), SETS[number]))
        elif rows:
            _, texts = rows.pop(number % len(rows))
            table.release(texts)
        assert table.num_lines == len({texts for _, texts in rows if texts is not None})
        lines = np.asarray([line for line, _ in rows], dtype=np.int32)
        for token in (*range(VOCAB), VOCAB, 10 * VOCAB):  # a model's vocabulary may be larger than its tokenizer's
            hits = table.hits(lines, np.full(len(rows), token, dtype=np.int32))
            assert hits == [
                index for index, (_, texts) in enumerate(rows) if texts is not None and token in texts.tokens
            ]
