"""The checks are checked: every planted fault is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gapless.outcome import Committed
from gapless.plan import Ints, Plan
from support.hash_model import HashModel
from support.sim.faults import FAULTS, MOST_SEEDS, Fault, hunt
from support.sim.parts import Parts, RigScheduler

DOCS = Path(__file__).parents[2] / "docs" / "correctness.md"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_found(fault: Fault):
    caught = hunt(fault)
    assert caught.violation is not None, f"not found in {MOST_SEEDS} schedules"
    assert caught.found, f"found by something else: {caught.violation}"


@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if fault.name.startswith("attention")], ids=lambda f: f.name
)
def test_the_hash_model_in_torch_depends_on_what_attention_is_told_too(fault: Fault):
    caught = hunt(replace(fault, parts=replace(fault.parts, model=HashModel)))
    assert caught.found, caught.violation


class _CrashesAtCommit(RigScheduler):
    def commit(self, plan: Plan, sampled: Ints) -> Committed:
        raise KeyError("an accident")


def test_an_accidental_crash_and_a_race_on_another_buffer_do_not_count():
    crash = hunt(Fault("a crash", Parts(scheduler=_CrashesAtCommit), by=("tokens", "books", "race: race on keys")))
    assert str(crash.violation).startswith("error: KeyError")
    assert not crash.found
    shared = next(fault for fault in FAULTS if fault.name == "slots share the device's inputs")
    assert hunt(shared).found
    assert not hunt(replace(shared, by=("race: race on device out",))).found


def test_the_table_in_the_docs_has_every_fault():
    text = DOCS.read_text()
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 20
    assert [fault.name for fault in FAULTS if f"| {fault.name} |" not in text] == []
