"""Cost of the host per decode step, on a device that does nothing: plan, fill, launch calls and commit.

Microseconds are medians over steps; allocations are blocks that Python still holds after a step, by
sys.getallocatedblocks, which counts growth and not churn.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gapless.bench.environment import environment
from gapless.bench.tiny_model import TinyModel
from gapless.config import EngineConfig
from gapless.device.null import NullDevice
from gapless.engine.admission import Admission, ModelFacts
from gapless.engine.build import build_loop
from gapless.engine.loop import Loop
from gapless.errors import InternalError
from gapless.params import SamplingParams
from gapless.sampling import make_sampler

WARM_UP_STEPS = 50
LEAST_BUDGET = 2**16  # tokens of a step, so that long contexts are prefilled quickly
WAITING_PROMPT = np.zeros(4, dtype=np.int32)


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


def measure(
    batch: int, context: int, queues: Sequence[int], *, steps: int = 500, lookahead: int = 1
) -> Iterator[HostRow]:
    """Time `steps` decode steps of `batch` rows that have `context` tokens each, for each number of waiting requests.

    All queues are measured on one loop, from the shortest on.
    """
    rows = SteadyLoop(batch, context, (steps + WARM_UP_STEPS) * len(queues), lookahead)
    for queue in sorted(queues):
        rows.wait(queue)
        yield _measure(rows.loop, batch, context, queue, steps, lookahead)


def _measure(loop: Loop, batch: int, context: int, queue: int, steps: int, lookahead: int) -> HostRow:
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
    """A loop whose rows all decode for `steps` more steps, with `queue` requests that find no row."""
    rows = SteadyLoop(batch, context, steps, lookahead)
    rows.wait(queue)
    return rows.loop


class SteadyLoop:
    """A loop whose `batch` rows all decode, for `steps` more steps; the device does nothing."""

    def __init__(self, batch: int, context: int, steps: int, lookahead: int) -> None:
        block_size, budget = 16, max(LEAST_BUDGET, 2 * batch)
        prefill_steps = -(-batch * context // (budget - batch))  # the first rows decode while others prefill
        self._params = SamplingParams(temperature=0, max_tokens=steps + prefill_steps + lookahead + 8)
        length = context + steps + prefill_steps + lookahead + 8
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
        self.loop, limits = build_loop(model, config, device, make_sampler(torch.device("cpu")), torch.float32)
        self._admission = Admission(limits, ModelFacts(model.vocab_size, model.eos_token_ids), config.seed)
        for index in range(batch):
            self._add(np.full(context, index % model.vocab_size, dtype=np.int32))
        while self.loop.scheduler.num_prefilling or self.loop.scheduler.num_running < batch:
            self.loop.step()

    def wait(self, queue: int) -> None:
        """Let so many requests wait, at least as many as before."""
        for _ in range(queue - self.loop.scheduler.num_waiting):
            self._add(WAITING_PROMPT)
        if self.loop.scheduler.num_waiting != queue:
            raise InternalError("the rows did not all run at once")

    def _add(self, prompt: NDArray[np.int32]) -> None:
        self.loop.scheduler.add(self._admission.make_request(prompt, self._params))


def host_environment() -> dict[str, str]:
    return environment("a device that does nothing", torch.device("cpu"))


def as_json(rows: list[HostRow], facts: dict[str, str]) -> dict[str, object]:
    """What `gapless bench host --json` prints last."""
    return {"rows": [asdict(row) for row in rows], "environment": facts}
