"""Decode steps are replayed whenever a graph holds their rows, and in no larger one than they need."""

from __future__ import annotations

from collections import Counter

from gapless.engine.layout import StepShape
from gapless.engine.slots import Slot
from gapless.plan import Plan
from support.sim.parts import Parts, RigRunner
from support.sim.rig import Rig
from support.sim.schedule import generate

SEEDS = range(100)


class _Remembers(RigRunner):
    """Keeps what it launched, by step: the plan and the shape that it was filled in."""

    launched: dict[int, tuple[Plan, StepShape]]

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> None:
        self.launched[plan.step] = (plan, shape)
        super().launch(plan, slot, shape)


def test_a_decode_step_is_replayed_in_the_smallest_bucket_that_fits_and_no_other_step_is():
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        schedule = generate(seed)
        rig = Rig(schedule, Parts(runner=_Remembers))
        assert isinstance(rig.loop.runner, _Remembers)
        launched = rig.loop.runner.launched = {}
        result = rig.run()
        assert result.violation is None, (seed, result.violation)
        ran = {span.step: span.name for span in result.device.timeline.spans if span.lane == "compute"}
        for step, (plan, shape) in launched.items():
            rows = plan.rows_E.size
            bucket = min((each for each in schedule.buckets if each >= rows), default=None)
            if bucket is None or not plan.decode_only:
                kind = "compute"
                assert (shape.tokens, shape.entries) == (plan.num_tokens, rows)
            else:
                kind = "replay"
                assert shape == StepShape.decode(bucket)
                seen["padded" if rows < bucket else "exact"] += 1
            assert ran.get(step, kind) == kind  # one that never ran failed, or was launched behind one that did
            seen[kind] += step in ran
    assert min(seen[kind] for kind in ("padded", "exact", "replay", "compute")) > 20, seen
