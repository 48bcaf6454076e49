"""Whatever ends the engine's thread: everybody who waits is told why, and the next engine in the process works."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.test_core import GREEDY, FailingModel, GatedModel, collect, make_engine
from gapless.attention.base import AttentionBatch, LayerKV
from gapless.config import EngineConfig, SchedulerLimits
from gapless.device.cpu import CpuDevice
from gapless.engine.admission import Admission, ModelFacts
from gapless.engine.build import build_loop
from gapless.engine.core import Engine, EngineFailure
from gapless.engine.loop import Loop
from gapless.errors import EngineDeadError, InternalError, OutOfMemoryError
from gapless.outcome import Committed, Sampled
from gapless.params import SamplingParams
from gapless.plan import Plan
from gapless.sampling import make_sampler
from gapless.scheduler import Scheduler
from support.hash_model import HashModel, expected_tokens
from support.scarce import ScarceModel
from support.waiting import eventually

LOOKAHEADS = [0, 1, 2]


class BrokenError(Exception):
    """What a test breaks the engine with."""


class FailingScheduler(Scheduler):
    """Works for a few steps, then one of its methods raises."""

    def __init__(self, limits: SchedulerLimits, method: str, error: BaseException) -> None:
        super().__init__(limits)
        self.method = method
        self.error = error
        self.left = 3

    def _count(self, method: str) -> None:
        self.left -= method == self.method
        if self.left < 0:
            raise self.error

    def plan(self) -> Plan | None:
        self._count("plan")
        return super().plan()

    def commit(self, plan: Plan, sampled: Sampled) -> Committed:
        self._count("commit")
        return super().commit(plan, sampled)


class Built:
    """An engine whose parts can be reached, and swapped while it is idle."""

    def __init__(self, lookahead: int) -> None:
        config = EngineConfig(max_rows=8, num_blocks=200, device="cpu", lookahead=lookahead)
        self.device, model = CpuDevice(), HashModel()
        sampler = make_sampler(torch.device("cpu"))
        self.loop: Loop
        self.loop, limits = build_loop(model, config, self.device, sampler, torch.float32)
        self.engine = Engine(self.loop, Admission(limits, ModelFacts(model.vocab_size, model.eos_token_ids), 0))

    def let_scheduler_fail(self, method: str, error: BaseException) -> None:
        self.loop.scheduler = FailingScheduler(self.loop.scheduler.limits, method, error)


def fail_in_plan(built: Built) -> None:
    built.let_scheduler_fail("plan", BrokenError("broken"))


def fail_in_commit(built: Built) -> None:
    built.let_scheduler_fail("commit", BrokenError("broken"))


def leave_from_plan(built: Built) -> None:
    built.let_scheduler_fail("plan", SystemExit("broken"))


def interrupt_commit(built: Built) -> None:
    built.let_scheduler_fail("commit", KeyboardInterrupt("broken"))


def fail_in_fill(built: Built) -> None:
    for slot in built.loop.slots.slots:
        slot.packed = slot.packed[:3]


def fail_in_launch(built: Built) -> None:
    built.device.close()


def fail_in_publish(built: Built) -> None:
    def publish(_: Committed) -> None:
        raise BrokenError("broken")

    built.loop.publish = publish


FAULTS: list[tuple[Callable[[Built], None], type[BaseException]]] = [
    (fail_in_plan, BrokenError),
    (fail_in_commit, BrokenError),
    (leave_from_plan, SystemExit),
    (interrupt_commit, KeyboardInterrupt),
    (fail_in_fill, ValueError),
    (fail_in_launch, InternalError),
    (fail_in_publish, BrokenError),
]


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize(("fault", "cause"), FAULTS)
def test_every_request_ends_with_the_cause_and_the_next_engine_works(
    fault: Callable[[Built], None], cause: type[BaseException], lookahead: int
):
    built = Built(lookahead)
    engine = built.engine
    fault(built)
    requests = [engine.admission.make_request([n], GREEDY) for n in range(20)]
    engine.submit(requests)
    with pytest.raises(EngineDeadError, match=f"the engine failed: {cause.__name__}") as caught:
        collect(engine, requests)
    assert isinstance(caught.value.__cause__, cause)
    with pytest.raises(EngineDeadError, match=cause.__name__):
        engine.submit(requests)
    engine.close()
    assert not engine.alive
    assert_healthy(make_engine(lookahead=lookahead))


def assert_healthy(engine: Engine) -> None:
    requests = [engine.admission.make_request([n], GREEDY) for n in range(3)]
    engine.submit(requests)
    tokens, _ = collect(engine, requests)
    assert [tokens[each.request_id] for each in requests] == [expected_tokens([n], 21, []) for n in range(3)]
    engine.close()


def test_a_request_that_is_submitted_twice_is_our_bug_and_ends_the_engine():
    engine = make_engine(GatedModel())
    request = engine.admission.make_request([1], GREEDY)
    engine.submit([request, request])
    with pytest.raises(EngineDeadError, match="added twice"):
        collect(engine, [request])


def test_the_end_is_told_once_and_last():
    built = Built(1)
    fail_in_commit(built)
    requests = [built.engine.admission.make_request([n], GREEDY) for n in range(4)]
    built.engine.submit(requests)
    records = [built.engine.outputs.get(timeout=30)]
    while not isinstance(records[-1], EngineFailure):
        records.append(built.engine.outputs.get(timeout=30))
    built.engine.close()
    assert built.engine.outputs.empty()
    assert len(records) == 4  # the three steps before


def test_a_failed_engine_gives_its_model_back_though_its_error_is_held():
    model = FailingModel(4)
    held = weakref.ref(model)
    engine = make_engine(model)
    del model
    request = engine.admission.make_request([1], GREEDY)
    engine.submit([request])
    with pytest.raises(EngineDeadError, match="a kernel went wrong") as caught:
        collect(engine, [request])
    gc.collect()
    assert held() is None
    cause = caught.value.__cause__
    assert cause is not None
    places = [each.name for each in caught.traceback[-1:]]
    assert places == ["collect"]
    assert cause.__traceback__ is not None  # which still tells where it was


class RaisingModel(HashModel):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be ..."), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("HIP error: unspecified launch failure"), True),
        (RuntimeError("CUDA error: invalid configuration argument"), False),
        (ValueError("an illegal memory access"), False),
    ],
)
def test_a_fault_that_outlives_the_engine_says_to_start_the_process_again(error: Exception, lasting: bool):
    engine = make_engine(RaisingModel(error))
    request = engine.admission.make_request([1], GREEDY)
    engine.submit([request])
    with pytest.raises(EngineDeadError) as caught:
        collect(engine, [request])
    assert ("start the process again" in str(caught.value)) == lasting
    engine.close()


# ----------------------------------------------------------------- memory


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_an_engine_without_memory_for_one_token_says_so_to_everybody(lookahead: int):
    engine = make_engine(ScarceModel(lambda tokens: True), lookahead=lookahead)
    requests = [engine.admission.make_request([n] * 5, GREEDY) for n in range(20)]
    engine.submit(requests)
    text = "OutOfMemoryError: there is no memory for a step of even one token: no memory for the activations"
    with pytest.raises(EngineDeadError, match=text) as caught:
        collect(engine, requests)
    assert isinstance(caught.value.__cause__, OutOfMemoryError)
    assert_healthy(make_engine(lookahead=lookahead))


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_an_engine_on_its_thread_survives_steps_without_memory(lookahead: int):
    engine = make_engine(ScarceModel(lambda tokens: tokens > 4), lookahead=lookahead)
    requests = [engine.admission.make_request([n] * 9, GREEDY) for n in range(20)]
    engine.submit(requests)
    tokens, _ = collect(engine, requests)
    for request in requests:
        assert tokens[request.request_id] == expected_tokens(request.prompt.tolist(), request.max_length, [])
    stats = engine.stats()
    assert stats.scheduler.failed_steps > 0
    assert stats.scheduler.generated_tokens == 20 * 20
    assert 0.0 < stats.busy_share <= 1.0
    engine.close()


# ----------------------------------------------------------------- stalls


class SteppedModel(HashModel):
    """Takes one step for each release."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = threading.Semaphore(0)
        self.waits = threading.Semaphore(0)

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        self.waits.release()
        assert self.steps.acquire(timeout=30)
        return super().forward(tokens_T, kv, batch)


def test_a_stall_shows_in_the_time_since_the_last_progress():
    model = SteppedModel()
    engine = make_engine(model, lookahead=0)
    assert engine.stats().seconds_since_progress == 0.0
    engine.submit([engine.admission.make_request([1], replace(GREEDY, max_tokens=3))])
    assert model.waits.acquire(timeout=30)
    first, second = engine.stats(), engine.stats()
    assert 0.0 < first.seconds_since_progress < second.seconds_since_progress
    assert second.seconds_since_progress == second.active_seconds  # nothing since work came
    model.steps.release()
    assert model.waits.acquire(timeout=30)  # in the second step
    stats = engine.stats()
    assert 0.0 < stats.seconds_since_progress < stats.active_seconds
    model.steps.release(2)
    eventually(lambda: engine.stats().seconds_since_progress == 0.0)
    assert engine.stats().scheduler.generated_tokens == 3
    engine.close()


def test_a_dead_engine_has_no_work_and_stalls_no_more():
    engine = make_engine(FailingModel(2))
    request = engine.admission.make_request([1], SamplingParams())
    engine.submit([request])
    with pytest.raises(EngineDeadError):
        collect(engine, [request])
    first, second = engine.stats(), engine.stats()
    assert first.seconds_since_progress == second.seconds_since_progress == 0.0
    assert first.active_seconds == second.active_seconds > 0.0
