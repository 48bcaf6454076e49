"""PROPERTIES 1 to 3: buffers in flight. Compared is what the buffers really hold, whatever is declared of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from gapless.config import SchedulerLimits
from gapless.device.base import Access, Note
from gapless.device.sim.streams import SimStream, Work
from gapless.engine.slots import Slot
from gapless.outcome import Committed, Sampled
from gapless.plan import Plan
from support.sim.faults.masks import CopiesBeforeFilled
from support.sim.faults.memory import SlotTooEarly, shared
from support.sim.faults.tokens import DeltasByTheHost, DeltasDeclaredAsNothing, LivePlan
from support.sim.parts import Parts, RigRunner, RigScheduler
from support.sim.rig import Result, Rig
from support.sim.rig_device import RigDevice
from support.sim.schedule import Schedule, generate

SEEDS = range(24)
MUTANT_SEEDS = range(60)  # that a mutant is looked for in
FEATURES = {
    "feature flags",
    "prompt length",
    "logprobs",
    "repetition penalty",
    "presence penalty",
    "frequency penalty",
    "token counts",
    "latest tokens",
    "feature record",
    "allowed tokens",
    "processor arguments",
}
TABLES = {"block table", "last token", "temperature", "top k", "top p", "min p", "seed"} | FEATURES


class _Watch:
    """Looks at slots and tables before and after each piece of work.

    wrong  what it saw
    seen   pieces of work by name, and changes by table
    """

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.seen: Counter[str] = Counter()
        self._slots: dict[str, Slot] = {}
        self._tables: dict[str, torch.Tensor] = {}
        self._known: dict[str, bytes] = {}  # what the tables hold
        self._launched: dict[int, torch.Tensor] = {}  # by step: its packed inputs when their copy was queued
        self._masks: dict[int, torch.Tensor] = {}  # and its masks

    def begin(self, rig: Rig) -> None:
        self._slots = {slot.letter: slot for slot in rig.loop.slots.slots}
        tables = rig.loop.runner.tables
        self._tables = {"block table": tables.block_table_RC, "last token": tables.last_token_R}
        self._tables |= tables.sampling.by_name()
        self._tables |= tables.features.by_name()
        self._tables["processor arguments"] = tables.arguments_RP
        self.accept_tables()

    def queued(self, note: Note) -> None:
        if note.name == "copy in":
            self._launched[note.step] = self._slots[note.slot].host_in.clone()
        if note.name == "copy masks":
            self._masks[note.step] = self._slots[note.slot].host_masks.clone()

    def before(self, note: Note) -> None:
        self.compare_tables("the host")
        self._compare_inputs(note, "before")

    def after(self, note: Note, stream: SimStream) -> None:
        if stream.faults.error is None:
            self._compare_inputs(note, "after")
            self.seen[note.name] += 1
        self.compare_tables(stream.name)  # what a step changes before it runs out of memory counts, too

    def _compare_inputs(self, note: Note, when: str) -> None:
        """A slot holds what was launched, in pinned memory until the copy has run and on the device from then on."""
        if note.name == "copy masks" and not torch.equal(self._slots[note.slot].host_masks, self._masks[note.step]):
            self.wrong.append(f"{when} {note.name} {note.step} the masks are not those that were launched")
        if note.name not in ("copy in", "take rows", "compute", "replay", "score", "sample"):
            return
        slot = self._slots[note.slot]
        inputs = slot.host_in if (note.name, when) == ("copy in", "before") else slot.device_in
        if not torch.equal(inputs, self._launched[note.step]):  # all of it: both were poisoned alike
            self.wrong.append(f"{when} {note.name} {note.step} its inputs are not those that were launched")

    def compare_tables(self, by: str) -> None:
        """With what they held; nobody but `by` has had a chance to change them since."""
        before = self._known
        self.accept_tables()
        for name in [name for name, content in before.items() if content != self._known[name]]:
            self.seen[name] += 1
            if by != "compute":
                self.wrong.append(f"{name} was changed by {by}")

    def accept_tables(self) -> None:
        self._known = {name: table.numpy().tobytes() for name, table in self._tables.items()}


class _WatchedRig(Rig):
    """Rows are poisoned by the host, which may do that."""

    def __init__(self, schedule: Schedule, parts: Parts) -> None:
        self.watch = watch = _Watch()

        class Stream(SimStream):
            def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
                if note is not None:
                    watch.queued(note)
                super().enqueue(work, note)

        class Device(parts.device):
            def _run(self, stream: SimStream) -> None:
                work, runs = stream.queue[0], stream.faults.error is None
                assert isinstance(work, Work)
                if runs:
                    watch.before(work.note)
                super()._run(stream)
                if runs:
                    watch.after(work.note, stream)

        super().__init__(schedule, replace(parts, device=Device, stream=Stream))
        watch.begin(self)

    def poison_row(self, row: int) -> None:
        self.watch.compare_tables("the host")
        super().poison_row(row)
        self.watch.accept_tables()


def watched(schedule: Schedule, parts: Parts | None = None) -> tuple[_Watch, Result]:
    rig = _WatchedRig(schedule, parts or Parts())
    result = rig.run()
    return rig.watch, result


def is_seen(what: str, parts: Parts) -> bool:
    """Whether one of the schedules shows this to be wrong with these parts."""
    return any(what in line for seed in MUTANT_SEEDS for line in watched(generate(seed), parts)[0].wrong)


def is_violated(what: str, parts: Parts) -> bool:
    """Whether one of the schedules ends with this violation."""
    return any(what in str(watched(generate(seed), parts)[1].violation) for seed in MUTANT_SEEDS)


# ---------------------------------------------------------------------- pinned buffers


@pytest.mark.parametrize("eagerness", [0.0, 1.0])
def test_no_pinned_buffer_is_rewritten_before_the_copy_that_reads_it_has_run(eagerness: float):
    """On a device that does nothing before the host waits, and on one that is done at once. There is no library with
    staging buffers of its own on the path: the copies of a step, of its inputs, its masks if it has any, and of what it
    brings, are the only ones."""
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        watch, result = watched(replace(generate(seed), eagerness=eagerness))
        assert result.violation is None, (seed, result.violation)
        assert watch.wrong == [], seed
        copies = {span.name for span in result.device.timeline.spans if span.lane in ("h2d", "d2h")}
        assert copies <= {"copy in", "copy masks", "copy out"}
        seen += watch.seen
    assert seen["copy in"] > 500
    assert seen["copy masks"] > 50


def test_a_pinned_buffer_that_is_rewritten_too_early_would_be_seen():
    assert is_seen("before copy in", Parts(slots=SlotTooEarly))
    assert is_seen("copy masks", Parts(masking=CopiesBeforeFilled))


# ---------------------------------------------------------------------- snapshots


class _RemembersPlans(RigScheduler):
    """Compares each plan at its commit with what it was when it was made."""

    def __init__(self, limits: SchedulerLimits, rig: Rig) -> None:
        super().__init__(limits, rig)
        self.made: dict[int, list[np.ndarray]] = {}

    def plan(self) -> Plan | None:
        plan = super().plan()
        if plan is not None:
            self.made[plan.step] = [each.copy() for each in _arrays(plan)]
        return plan

    def commit(self, plan: Plan, sampled: Sampled) -> Committed:
        for then, now in zip(self.made.pop(plan.step), _arrays(plan), strict=True):
            assert np.array_equal(then, now), "the plan has changed since it was made"
        return super().commit(plan, sampled)


class _RemembersLivePlans(_RemembersPlans, LivePlan):
    """Rows of its plans are a view of an array that the next plan overwrites."""


def _arrays(plan: Plan) -> list[np.ndarray]:
    """Every array of a plan and of its parts."""
    parts = [each for each in (plan, plan.params, plan.lines, plan.scores) if each is not None]
    values = [getattr(each, field.name) for each in parts for field in fields(each)]
    return [each for each in values if isinstance(each, np.ndarray)]


def test_a_step_reads_its_own_snapshot_whatever_changes_while_it_is_in_flight():
    """On the host its plan, until the commit; on the device its inputs as they were launched, until it has run."""
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        watch, result = watched(generate(seed), Parts(scheduler=_RemembersPlans))
        assert result.violation is None, (seed, result.violation)
        assert watch.wrong == [], seed
        seen += watch.seen
    assert min(seen["compute"], seen["replay"]) > 100


def test_a_plan_and_inputs_that_change_in_flight_would_be_seen():
    assert is_violated("the plan has changed", Parts(scheduler=_RemembersLivePlans))
    assert is_seen("before compute", shared("device_in"))


# ---------------------------------------------------------------------- tables on the device


def test_tables_on_the_device_are_changed_by_the_compute_stream_only():
    """So every reader in flight comes first."""
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        watch, result = watched(generate(seed))
        assert result.violation is None, (seed, result.violation)
        assert watch.wrong == [], seed
        seen += watch.seen
    assert seen.keys() >= TABLES


@pytest.mark.parametrize(("runner", "by"), [(DeltasByTheHost, "the host"), (DeltasDeclaredAsNothing, "h2d")])
@pytest.mark.parametrize("table", ["block table", "temperature"])
def test_tables_that_others_change_would_be_seen(runner: type[RigRunner], by: str, table: str):
    assert is_seen(f"{table} was changed by {by}", Parts(runner=runner))


class _KeepsQuiet(RigDevice):
    """Is not told that a step writes to one of the tables."""

    table = ""

    def _check_writes(self, accesses: Iterable[Access]) -> Iterable[Access]:
        return [each for each in super()._check_writes(accesses) if not (each.write and each.name == self.table)]


@pytest.mark.parametrize("table", sorted(TABLES))
def test_a_change_of_a_table_that_is_not_declared_would_be_seen_by_the_audit(table: str):
    """test_schedules runs schedules with the audit: each of their changes is declared."""
    device = type("KeepsQuiet", (_KeepsQuiet,), {"table": table})
    assert is_violated(f"wrote to {table} without declaring it", Parts(device=device, audit=True))
