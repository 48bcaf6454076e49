"""Cost of the host per decode step, on a device that does nothing: plan, fill, launch calls and commit.

Microseconds are medians over steps; allocations are blocks that Python still holds after a step, by
sys.getallocatedblocks, which counts growth and not churn.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from gapless.bench.tiny_model import TinyModel
from gapless.config import EngineConfig
from gapless.device.null import NullDevice
from gapless.engine.admission import Admission, ModelFacts
from gapless.engine.build import build_loop
from gapless.engine.loop import Loop
from gapless.errors import InternalError
from gapless.request import SamplingParams
from gapless.sampling import make_sampler

WARM_UP_STEPS = 50


@dataclass(frozen=True, slots=True)
class HostRow:
    """One measurement. us_* are microseconds per step."""

    batch: int
    context: int
    queue: int
    lookahead: int
    us_per_step: float
    us_p99: float
    allocations_per_step: float


def measure(batch: int, context: int, queue: int, *, steps: int = 500, lookahead: int = 1) -> HostRow:
    """Time `steps` decode steps of `batch` rows that have `context` tokens each, with `queue` requests waiting."""
    loop = steady_loop(batch, context, queue, steps + WARM_UP_STEPS, lookahead)
    for _ in range(WARM_UP_STEPS):
        loop.step()
    times = np.zeros(steps)
    gc.collect()
    gc.disable()
    try:
        held = sys.getallocatedblocks()
        for index in range(steps):
            begin = time.perf_counter()
            loop.step()
            times[index] = time.perf_counter() - begin
        grown = sys.getallocatedblocks() - held
    finally:
        gc.enable()
    return HostRow(
        batch=batch,
        context=context,
        queue=queue,
        lookahead=lookahead,
        us_per_step=round(float(np.median(times)) * 1e6, 1),
        us_p99=round(float(np.quantile(times, 0.99)) * 1e6, 1),
        allocations_per_step=round(grown / steps, 2),
    )


def steady_loop(batch: int, context: int, queue: int, steps: int, lookahead: int) -> Loop:
    """A loop whose rows all decode, with `queue` requests that find no row."""
    block_size, budget = 16, max(8192, batch)
    new_tokens = steps + -(-batch * context // budget) + lookahead + 8  # the first rows decode while others prefill
    length = context + new_tokens
    config = EngineConfig(
        lookahead=lookahead,
        max_rows=batch,
        max_batch_tokens=budget,
        max_model_len=length,
        block_size=block_size,
        num_blocks=batch * (-(-length // block_size) + 1),
        device="cpu",
    )
    model, device = TinyModel(), NullDevice()
    loop, limits = build_loop(model, config, device, make_sampler(torch.device("cpu")), torch.float32)
    admission = Admission(limits, ModelFacts(model.vocab_size, model.eos_token_ids), config.seed)
    params = SamplingParams(temperature=0, max_tokens=new_tokens)
    for index in range(batch + queue):
        loop.scheduler.add(
            admission.make_request([index % model.vocab_size] * (context if index < batch else 4), params)
        )
    while loop.scheduler.num_prefilling or loop.scheduler.num_running < batch:
        loop.step()
    if loop.scheduler.num_waiting != queue:
        raise InternalError("the rows did not all run at once")
    return loop


def as_json(rows: list[HostRow]) -> dict[str, object]:
    """What `gapless bench host --json` prints last."""
    return {"rows": [asdict(row) for row in rows], "python": sys.version.split()[0], "torch": torch.__version__}
