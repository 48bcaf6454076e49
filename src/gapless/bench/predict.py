"""What lookahead gains, predicted: the real loop on the simulated device, in virtual time.

Nothing is measured. The answer follows from what a step costs the host and what it costs the device, so it says for a
machine that is not there when one step ahead is enough and when it is not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import count

import torch

from gapless.bench.tiny_model import TinyModel
from gapless.config import EngineConfig
from gapless.device.sim import SimDevice, TimedOrder
from gapless.engine.admission import Admission, ModelFacts
from gapless.engine.build import build_loop
from gapless.outcome import Committed
from gapless.params import SamplingParams
from gapless.sampling import make_sampler
from gapless.spans import Run, Span

BEFORE_LAUNCH = 2 / 3
"""Share of the host's time that lies before the launch is done (plan, fill, queueing); commit and publish are the rest.
An assumption, which moves the result little: what counts is the sum."""

WARM_UP = 20
ROWS = 2


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of steady decode.

    host, device   seconds that a step costs each on average
    jitter         standard deviation of the host's cost over its mean (gamma distributed)
    idle_share     part of the time in which the compute stream runs nothing, 0 to 1
    step_seconds   from one step's end to the next one's
    run            what happened when, in virtual time
    """

    lookahead: int
    host: float
    device: float
    jitter: float
    idle_share: float
    step_seconds: float
    run: Run


def predict(
    lookahead: int,
    *,
    host: float,
    device: float,
    copy: float = 0.0,
    jitter: float = 0.0,
    steps: int = 500,
    seed: int = 0,
) -> Prediction:
    """Run `steps` decode steps in virtual time. All costs in seconds.

    copy  of each of the two copies, which run beside the compute stream
    """
    draw = _host_costs(host, jitter, seed)
    costs = {"copy in": copy, "copy out": copy, "compute": device, "replay": device}
    sim = SimDevice(
        TimedOrder(),
        cost=lambda note: costs.get(note.name, 0.0),
        host_cost=lambda note: draw() * BEFORE_LAUNCH if note.name == "copy in" else 0.0,
    )
    length = steps + WARM_UP + lookahead + 8
    config = EngineConfig(
        lookahead=lookahead, max_rows=ROWS, max_model_len=length, num_blocks=ROWS * (length // 16 + 2), graphs=False
    )
    model = TinyModel(vocab_size=2)
    loop, limits = build_loop(model, config, sim, make_sampler(torch.device("cpu")), torch.float32)

    published = count()

    def publish(committed: Committed) -> None:
        step = next(published)
        slot = loop.slots.slots[step % (lookahead + 1)].letter
        sim.spend("commit", draw() * (1 - BEFORE_LAUNCH), step, slot)

    loop.publish = publish
    admission = Admission(limits, ModelFacts(model.vocab_size, model.eos_token_ids), 0)
    for _ in range(ROWS):
        request = admission.make_request([0], SamplingParams(temperature=0.0, max_tokens=length - 1))
        loop.scheduler.add(request)
    for _ in range(WARM_UP + steps):
        loop.step()
    loop.close()
    note = f"simulated: a step takes the host {host * 1e3:g} ms, the device {device * 1e3:g} ms"
    run = Run(f"lookahead {lookahead}", note, sim.timeline.lanes, sim.timeline.spans)
    return Prediction(lookahead, host, device, jitter, *_steady(run.spans), run)


def _host_costs(mean: float, jitter: float, seed: int) -> Callable[[], float]:
    rng = random.Random(seed)
    if jitter == 0.0 or mean == 0.0:
        return lambda: mean
    shape = 1.0 / jitter**2
    return lambda: rng.gammavariate(shape, mean / shape)


def _steady(spans: Sequence[Span]) -> tuple[float, float]:
    """Idle share and time per step of the compute stream, from the first step after the warm-up to the last."""
    compute = [span for span in spans if span.lane == "compute" and span.step >= WARM_UP]
    window = compute[-1].end - compute[0].end
    busy = sum(span.end - span.begin for span in compute[1:])
    return (max(0.0, 1.0 - busy / window) if window else 0.0), window / (len(compute) - 1)


def as_json(predictions: Sequence[Prediction]) -> dict[str, object]:
    """What `gapless bench predict --json` prints last."""
    kept = [each.name for each in fields(Prediction) if each.name != "run"]
    return {"rows": [{name: getattr(each, name) for name in kept} for each in predictions]}
