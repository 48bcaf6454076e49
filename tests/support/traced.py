"""Real loops under a trace, stepped by hand."""

from __future__ import annotations

import torch

from gapless.config import EngineConfig
from gapless.device.base import Device
from gapless.device.cpu import CpuDevice
from gapless.engine.admission import Admission, ModelFacts
from gapless.engine.build import build_loop
from gapless.models.base import Model
from gapless.outcome import Committed
from gapless.params import SamplingParams
from gapless.sampling import make_sampler
from gapless.trace.device import traced
from gapless.trace.record import Trace
from support.hash_model import HashModel

PROMPTS = ([5], [7, 8, 9], [3, 1])


def run_loop(
    trace: Trace | None,
    lookahead: int,
    *,
    device: Device | None = None,
    model: Model | None = None,
    new_tokens: int = 12,
) -> list[tuple[int, int]]:
    """Answer PROMPTS. Returns (request, token) in the order in which they were published."""
    device, parts = traced(device or CpuDevice(), trace)
    model = model or HashModel(device=device.torch_device)
    sampler = make_sampler(device.torch_device)
    config = EngineConfig(lookahead=lookahead, max_rows=8, num_blocks=64, max_model_len=128)
    loop, limits = build_loop(model, config, device, sampler, torch.float32, parts)
    told: list[tuple[int, int]] = []

    def publish(committed: Committed) -> None:
        told.extend(zip(committed.request_ids.tolist(), committed.tokens.tolist(), strict=True))

    loop.publish = publish
    admission = Admission(limits, ModelFacts(model.vocab_size, model.eos_token_ids), 0)
    for prompt in PROMPTS:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        loop.scheduler.add(admission.make_request(prompt, params))
    try:
        while loop.has_work:
            loop.step()
    finally:
        loop.close()
    return told
