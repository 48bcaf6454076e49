"""Real shortage of GPU memory in the middle of a step."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.config import EngineConfig
from gapless.device import has_cuda, open_device
from gapless.params import SamplingParams
from support.hash_model import HashModel, expected_tokens
from support.scarce import ScarceHarness, ScarceModel
from support.schedules import check_schedule, run_schedule

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")]

LOOKAHEADS = [0, 1, 2, 3]
GPU = torch.device("cuda")
MIB = 2**20
PER_TOKEN = 32 * MIB


def allocate_far_too_much() -> None:
    torch.empty(2**50, dtype=torch.uint8, device=GPU)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("seed", range(2000, 2006))
def test_failures_at_any_time_leave_every_request_its_tokens(seed: int, lookahead: int):
    luck = random.Random(seed)

    def build(config: EngineConfig) -> ScarceHarness:
        model = ScarceModel(lambda tokens: False, allocate_far_too_much, GPU)
        engine = ScarceHarness(config, model, open_device("cuda"))
        model.fails = lambda tokens: tokens > 1 and luck.random() < 0.3  # not while graphs are captured
        return engine

    check_schedule(*run_schedule(seed, lookahead, build=build))


class LargeModel(HashModel):
    """Wants 32 MiB of scratch memory for each token of a step."""

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        scratch_TM = torch.ones((tokens_T.numel(), PER_TOKEN), dtype=torch.uint8, device=GPU)
        return super().forward(tokens_T, kv, batch) + (scratch_TM[:, -1:].long() - 1)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("graphs", [True, False])
def test_somebody_else_takes_the_memory_and_smaller_steps_go_on(lookahead: int, graphs: bool):
    config = EngineConfig(
        lookahead=lookahead,
        max_rows=6,
        max_batch_tokens=64,
        block_size=4,
        num_blocks=200,
        graphs=graphs,
        graph_tokens=0,
        device="cuda",
    )
    with ScarceHarness(config, LargeModel(device=GPU), open_device("cuda")) as engine:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held_before = torch.cuda.memory_allocated()
        free, _ = torch.cuda.mem_get_info()
        hog = torch.empty(free - 40 * PER_TOKEN, dtype=torch.uint8, device=GPU)
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        requests = [engine.add([number] * (20 + 9 * number), params) for number in range(8)]
        engine.run()
        assert engine.scheduler.stats.failed_steps > 0
        assert max(engine.watched.sizes) == 64
        for request in requests:
            expected = expected_tokens(request.prompt.tolist(), request.max_length, [])
            assert engine.tokens[request.request_id] == expected
        del hog
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() < held_before + MIB  # nothing of the failed steps is left
        failed = engine.scheduler.stats.failed_steps
        while engine.scheduler.budget.tokens < 64:
            engine.add([1], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
            engine.run()
        engine.add([2] * 64, params)
        engine.run()
        assert engine.scheduler.stats.failed_steps == failed
