"""A scheduler of the rig that keeps what each step ran."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from gapless.config import SchedulerLimits
from gapless.plan import Plan
from support.sim.parts import Parts, RigScheduler
from support.sim.rig import Result, Rig
from support.sim.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens of each request in one step, who had one token left to compute before it, and who waited after it."""

    counts: dict[int, int]
    decoding: set[int]
    waiting: set[int]


class FedScheduler(RigScheduler):
    """Keeps all steps."""

    def __init__(self, limits: SchedulerLimits, rig: Rig) -> None:
        super().__init__(limits, rig)
        self.steps: list[Step] = []

    def plan(self) -> Plan | None:
        self._refresh_rows()
        decoding = set(self.rows.request_id[self._decoding].tolist())
        plan = super().plan()
        if plan is not None:
            ids = self.rows.request_id[plan.rows_E].tolist()
            counts = dict(zip(ids, plan.counts_E.tolist(), strict=True))
            self.steps.append(Step(counts, decoding, self.requests_without_row()))
        return plan


def run_fed(schedule: Schedule) -> tuple[Result, FedScheduler]:
    """Run a schedule, which must come to its end without a violation."""
    rig = Rig(schedule, Parts(scheduler=FedScheduler))
    result = rig.run()
    assert result.violation is None, result.violation
    assert isinstance(rig.scheduler, FedScheduler)
    return result, rig.scheduler


def tokens_fed(scheduler: FedScheduler) -> Counter[int]:
    """By request."""
    fed: Counter[int] = Counter()
    for step in scheduler.steps:
        fed.update(step.counts)
    return fed
