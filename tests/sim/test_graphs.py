"""Steps are replayed whenever a graph holds them, and in no larger one than they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from gapless.engine.layout import StepShape
from gapless.engine.slots import Slot
from gapless.plan import Plan
from support.sim.parts import Parts, RigRunner
from support.sim.rig import Rig
from support.sim.schedule import generate

SEEDS = range(40)


class _Remembers(RigRunner):
    """Keeps what it launched, by step: the plan and the shape that it was filled in."""

    launched: dict[int, tuple[Plan, StepShape]]

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> Callable[[int], None]:
        self.launched[plan.step] = (plan, shape)
        return super().launch(plan, slot, shape)


def holds(shape: StepShape, plan: Plan) -> bool:
    chunks, new = plan.rows_E.size - plan.num_decodes, plan.params.rows_A.size
    return (
        shape.decodes >= plan.num_decodes
        and shape.tokens - shape.decodes >= plan.num_tokens - plan.num_decodes
        and shape.entries - shape.decodes >= chunks
        and min(shape.samples, shape.admitted) >= max(plan.num_samples, new)
        and shape.updates >= plan.block_ids_U.size
    )


def test_a_step_is_replayed_in_the_smallest_shape_that_fits_and_no_other_step_is():
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        schedule = generate(seed)
        rig = Rig(schedule, Parts(runner=_Remembers))
        assert isinstance(rig.loop.runner, _Remembers)
        launched = rig.loop.runner.launched = {}
        result = rig.run()
        assert result.violation is None, (seed, result.violation)
        ran = {span.step: span.name for span in result.device.timeline.spans if span.name in ("compute", "replay")}
        for step, (plan, shape) in launched.items():
            rows = plan.rows_E.size
            bucket = min((each for each in schedule.buckets if each >= rows), default=None)
            mixed = [each for each in schedule.mixed if holds(each, plan)]
            if not plan.decode_only and mixed:
                kind = "replay"
                assert shape in mixed
                assert shape.tokens == min(each.tokens for each in mixed)
                seen["mixed"] += 1
                seen["apart"] += shape.decodes > plan.num_decodes > 0
            elif bucket is None or not plan.decode_only:
                kind = "compute"
                assert (shape.tokens, shape.entries) == (plan.num_tokens, rows)
            else:
                kind = "replay"
                seen["continues"] += plan.continues
                assert shape == StepShape.decode(bucket)
                seen["padded" if rows < bucket else "exact"] += 1
            if plan.scores is not None:  # the logits of prompts are no part of any graph
                kind = "compute"
                seen["scores"] += 1
            assert ran.get(step, kind) == kind  # one that never ran failed, or was launched behind one that did
            seen[kind] += step in ran
    kinds = ("padded", "exact", "mixed", "apart", "continues", "replay", "compute", "scores")
    assert min(seen[kind] for kind in kinds) > 5, seen
