"""PROPERTIES 1 to 3: buffers in flight."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gapless.outcome import Committed
from gapless.plan import Ints, Plan
from support.sim.parts import Parts, RigScheduler
from support.sim.rig import run
from support.sim.schedule import generate

SEEDS = range(60)


@pytest.mark.parametrize("eagerness", [0.0, 1.0])
def test_no_pinned_buffer_is_rewritten_before_the_copy_that_reads_it_has_run(eagerness: float):
    """On a device that does nothing before the host waits, and on one that is done at once. There is no library with
    staging buffers of its own on the path: the two copies of a step are the only ones."""
    for seed in SEEDS:
        result = run(dataclasses.replace(generate(seed), eagerness=eagerness))
        assert result.violation is None, (seed, result.violation)
        copies = {span.name for span in result.device.timeline.spans if span.lane in ("h2d", "d2h")}
        assert copies <= {"copy in", "copy out"}


class _RemembersPlans(RigScheduler):
    """Compares each plan at its commit with what it was when it was made."""

    made: dict[int, list[np.ndarray]]
    compared = 0

    def plan(self) -> Plan | None:
        plan = super().plan()
        if plan is not None:
            self.__dict__.setdefault("made", {})[plan.step] = [each.copy() for each in _arrays(plan)]
        return plan

    def commit(self, plan: Plan, sampled: Ints) -> Committed:
        for then, now in zip(self.made.pop(plan.step), _arrays(plan), strict=True):
            assert np.array_equal(then, now), "the plan has changed since it was made"
        type(self).compared += 1
        return super().commit(plan, sampled)


def _arrays(plan: Plan) -> list[np.ndarray]:
    """Every array of a plan and of its parameters."""
    fields = [getattr(plan, field.name) for field in dataclasses.fields(plan)]
    fields += [getattr(plan.params, field.name) for field in dataclasses.fields(plan.params)]
    return [each for each in fields if isinstance(each, np.ndarray)]


def test_a_step_reads_its_own_snapshot_whatever_changes_while_it_is_in_flight():
    _RemembersPlans.compared = 0
    for seed in SEEDS:
        result = run(generate(seed), Parts(scheduler=_RemembersPlans))
        assert result.violation is None, (seed, result.violation)
    assert _RemembersPlans.compared > 500


def test_tables_on_the_device_are_written_by_the_compute_stream_only():
    """So every reader in flight comes first. Which stream used what is what the checker has booked."""
    tables = {"block table", "last token", "temperature", "top k", "top p", "min p", "seed"}
    writers: set[str] = set()
    for seed in SEEDS:
        uses = run(generate(seed)).device.checker.uses()
        writers |= {use.thread for name, use in uses if name in tables and use.write and use.what != "released"}
    assert writers == {"compute"}
