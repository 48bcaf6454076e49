"""A slot is as large as the largest step that its limits allow."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest

from gapless.engine.layout import Sections, StepShape, sections_of


def shapes(max_tokens: int, max_rows: int, max_updates: int) -> Iterator[StepShape]:
    """All that a step of these limits can have."""
    for tokens, updates in product(range(1, max_tokens + 1), range(max_updates + 1)):
        for entries in range(1, min(tokens, max_rows) + 1):
            for decodes, samples, admitted in product(range(entries + 1), repeat=3):
                yield StepShape(tokens, decodes, entries, samples, updates, admitted)


@pytest.mark.parametrize(("max_tokens", "max_rows", "max_updates"), [(2, 1, 0), (4, 3, 2), (7, 2, 5), (9, 4, 1)])
def test_the_largest_step_fills_a_slot_to_its_end(max_tokens: int, max_rows: int, max_updates: int):
    largest = max(sections_of(shape).total for shape in shapes(max_tokens, max_rows, max_updates))
    assert sections_of(StepShape(max_tokens, 0, max_rows, max_rows, max_updates, max_rows)).total == largest


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_slot_holds_a_step_of_as_many_tokens_as_rows_and_every_bucket(rows: int):
    capacity = sections_of(StepShape(rows, 0, rows, rows, 2 * rows, rows)).total
    assert max(sections_of(shape).total for shape in shapes(rows, rows, 2 * rows)) <= capacity
    assert sections_of(StepShape.decode(rows)).total <= capacity


@pytest.mark.parametrize("decodes_only", [False, True])
def test_every_section_begins_at_a_multiple_of_16_bytes(decodes_only: bool):
    """Else kernels would be compiled anew for each mix of addresses that comes along."""
    for count in range(1, 9):
        shape = StepShape.decode(count) if decodes_only else StepShape(count + 5, count, count + 2, count, 3, count)
        sections = [getattr(sections_of(shape), name) for name in Sections.__slots__ if name != "total"]
        assert len(sections) == 17
        assert all(section.start % 4 == 0 for section in sections)
