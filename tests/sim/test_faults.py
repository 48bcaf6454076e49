"""The checks are checked: every planted fault is found.

Each in the schedule that the docs' table names. `make faults` looks for them from the first schedule on.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from gapless.outcome import Committed, Sampled
from gapless.plan import Plan
from support.sim.faults import FAULTS, MOST_SEEDS, Caught, Fault, hunt
from support.sim.model import KeyedHashModel
from support.sim.parts import Parts, RigScheduler
from support.sim.rig import run

DOCS = Path(__file__).parents[2] / "docs" / "correctness.md"
BY_NAME = {fault.name: fault for fault in FAULTS}


@cache
def table() -> dict[str, str]:
    """Lines of the docs, by fault. `python scripts/correctness.py faults` makes them again."""
    text = DOCS.read_text().split("<!-- faults -->")[1].split("<!-- /faults -->")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return {line.removeprefix("| ").split(" | ")[0]: line for line in lines}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_found_as_the_table_in_the_docs_says(fault: Fault):
    line = table()[fault.name]
    schedules = int(line.split(" | ")[1])
    assert schedules <= MOST_SEEDS
    seen = run(fault.schedule(schedules - 1), fault.parts).violation
    caught = Caught(fault, schedules, seen)
    assert caught.found, f"found by something else: {seen}"
    assert caught.line == line


@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if fault.name.startswith("attention")], ids=lambda f: f.name
)
def test_the_hash_model_in_torch_depends_on_what_attention_is_told_too(fault: Fault):
    caught = hunt(replace(fault, parts=replace(fault.parts, model=KeyedHashModel)))
    assert caught.found, caught.violation


class _CrashesAtCommit(RigScheduler):
    def commit(self, plan: Plan, sampled: Sampled) -> Committed:
        raise KeyError("an accident")


def test_an_accidental_crash_and_a_race_on_another_buffer_do_not_count():
    crash = hunt(Fault("a crash", Parts(scheduler=_CrashesAtCommit), by=("tokens", "books", "race: race on keys")))
    assert str(crash.violation).startswith("error: KeyError")
    assert not crash.found
    shared = BY_NAME["slots share the device's inputs"]
    assert hunt(shared).found
    assert not hunt(replace(shared, by=("race: race on device out",))).found


def test_of_several_races_one_without_poison_is_told():
    fault, poison_came_first = BY_NAME["d2h waits for h2d_done in place of compute_done"], 0
    for seed in range(60):
        result = run(fault.schedule(seed), fault.parts)
        with_poison = ["(released" in str(race) for race in result.device.checker.races]
        assert result.violation is not None
        assert ("(released" in result.violation.text) == all(with_poison)
        poison_came_first += with_poison[0] and not all(with_poison)
    assert poison_came_first > 0


def test_the_table_in_the_docs_is_of_these_faults():
    assert list(table()) == [fault.name for fault in FAULTS]
    assert len(BY_NAME) == len(FAULTS) >= 20


def test_the_report_that_the_docs_quote_is_one_of_the_table():
    quoted = re.findall(r"`(race on [^`]+)`", " ".join(DOCS.read_text().split()))
    said = [line.split(" | ")[-1].removesuffix(" |") for line in table().values()]
    assert quoted
    assert all(quote in said for quote in quoted)
