"""The same oracle on real CUDA streams, with captured graphs, the fused sampler and pinned copies."""

from __future__ import annotations

import pytest

from gapless.device import has_cuda, open_device
from support.schedules import check_schedule, run_schedule

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")]


@pytest.mark.parametrize("lookahead", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(1000, 1012))
def test_every_request_gets_the_tokens_that_it_gets_alone_on_the_cpu(seed: int, lookahead: int):
    check_schedule(*run_schedule(seed, lookahead, open_device("cuda")))
