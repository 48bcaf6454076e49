"""Busy seconds are those that the compute stream computes, however long it waits. In virtual time, so exactly."""

from __future__ import annotations

import pytest
import torch

from gapless.bench.tiny_model import TinyModel
from gapless.config import EngineConfig
from gapless.device.sim import SimDevice, TimedOrder
from gapless.engine.admission import Admission, ModelFacts
from gapless.engine.build import build_loop
from gapless.params import SamplingParams
from gapless.sampling import make_sampler

DEVICE = 1e-3
TOKENS = 20


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("copy", [0.0, 0.4e-3, 3e-3])  # the compute stream waits for the longer ones at any lookahead
@pytest.mark.parametrize("host", [0.0, 2e-3])
def test_busy_seconds_are_steps_times_their_cost_whatever_copies_and_host_take(
    lookahead: int, graphs: bool, copy: float, host: float
):
    costs = {"copy in": copy, "copy out": copy, "compute": DEVICE, "replay": DEVICE}
    device = SimDevice(
        TimedOrder(),
        captures_graphs=graphs,
        cost=lambda note: costs.get(note.name, 0.0),
        host_cost=lambda note: host if note.name == "copy in" else 0.0,
    )
    config = EngineConfig(lookahead=lookahead, max_rows=2, max_model_len=64, num_blocks=8)
    model = TinyModel(vocab_size=2)
    loop, limits = build_loop(model, config, device, make_sampler(torch.device("cpu")), torch.float32)
    admission = Admission(limits, ModelFacts(model.vocab_size, model.eos_token_ids), 0)
    loop.scheduler.add(admission.make_request([0], SamplingParams(temperature=0.0, max_tokens=TOKENS)))
    while loop.has_work:
        loop.step()
    loop.close()
    assert loop.scheduler.stats.steps == TOKENS
    assert loop.slots.busy_seconds == pytest.approx(TOKENS * DEVICE)
