"""The same on real CUDA streams: what the device's clock says fits what the host's says."""

from __future__ import annotations

from itertools import pairwise

import pytest

from gapless.device import has_cuda, open_device
from gapless.trace.record import Trace
from support.traced import run_loop

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")]

APART = 1e-3  # seconds that the two clocks may be apart: on a busy machine, the anchor is reached late


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_the_device_works_on_a_step_between_its_launch_and_its_collection(lookahead: int):
    trace = Trace()
    assert run_loop(trace, lookahead, device=open_device("cuda")) == run_loop(None, lookahead)
    (run,) = trace.runs()
    assert len(run.spans) == 12 * 9
    at = {(span.step, "compute" if span.lane == "compute" else span.name): span for span in run.spans}
    for step in range(12):
        stages = [at[step, name] for name in ("copy in", "compute", "copy out")]
        assert all(stage.begin <= stage.end for stage in stages)
        assert all(first.end <= then.begin + 1e-5 for first, then in pairwise(stages))
        assert at[step, "launch"].begin - APART <= stages[0].begin
        assert stages[-1].end <= at[step, "collect"].end + APART
