"""The checks are checked: every planted fault is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.sim.faults import FAULTS, MOST_SEEDS, Fault, hunt

DOCS = Path(__file__).parents[2] / "docs" / "correctness.md"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_found(fault: Fault):
    caught = hunt(fault)
    assert caught.violation is not None, f"not found in {MOST_SEEDS} schedules"


def test_the_table_in_the_docs_has_every_fault():
    text = DOCS.read_text()
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 20
    assert [fault.name for fault in FAULTS if f"| {fault.name} |" not in text] == []
