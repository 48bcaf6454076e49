"""The engine on its thread: waking, idling, cancelling, failing, closing."""

from __future__ import annotations

import gc
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.config import EngineConfig
from gapless.device.cpu import CpuDevice
from gapless.engine.admission import Admission, ModelFacts
from gapless.engine.build import build_engine, build_loop
from gapless.engine.core import Engine, EngineFailure
from gapless.errors import ConfigError, EngineDeadError, OutOfMemoryError
from gapless.models.base import Model
from gapless.outcome import Finished
from gapless.params import SamplingParams
from gapless.request import FinishReason, Request
from gapless.sampling import make_sampler
from support.hash_model import HashModel, expected_tokens
from support.waiting import eventually

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


class GatedModel(HashModel):
    """Stands still in its forward pass until the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.entered = threading.Event()

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        self.entered.set()
        assert self.gate.wait(30)
        return super().forward(tokens_T, kv, batch)


class FailingModel(HashModel):
    """Works for a few steps, then raises."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise ArithmeticError("a kernel went wrong")
        return super().forward(tokens_T, kv, batch)


def make_engine(model: Model | None = None, **options: Any) -> Engine:
    config = replace(EngineConfig(max_rows=8, num_blocks=200, device="cpu"), **options)
    return build_engine(model or HashModel(), config, CpuDevice(), make_sampler(torch.device("cpu")), torch.float32)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = make_engine()
    yield engine
    engine.close()


def collect(engine: Engine, requests: list[Request]) -> tuple[dict[int, list[int]], dict[int, Finished]]:
    """Read outputs until all of these have ended."""
    tokens: dict[int, list[int]] = {request.request_id: [] for request in requests}
    ends: dict[int, Finished] = {}
    while len(ends) < len(requests):
        record = engine.outputs.get(timeout=30)
        if isinstance(record, EngineFailure):
            raise record.error
        for request_id, token in zip(record.request_ids.tolist(), record.tokens.tolist(), strict=True):
            tokens[request_id].append(token)
        ends.update({end.request_id: end for end in record.finished})
    return tokens, ends


def test_requests_from_many_threads_all_get_their_tokens(engine: Engine):
    made: list[Request] = []
    lock = threading.Lock()

    def submit(number: int) -> None:
        request = engine.admission.make_request([number, number + 1], GREEDY)
        with lock:
            made.append(request)
        engine.submit([request])

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tokens, _ = collect(engine, made)
    for request in made:
        assert tokens[request.request_id] == expected_tokens(request.prompt.tolist(), 22, [])


def test_an_engine_that_starts_idle_wakes_at_once_and_goes_idle_again(engine: Engine):
    for _ in range(20):
        request = engine.admission.make_request([1], GREEDY)
        engine.submit([request])
        tokens, _ = collect(engine, [request])
        assert len(tokens[request.request_id]) == 20


class Bell(threading.Event):
    """Remembers how it was waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.timeouts: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.timeouts.append(timeout)
        return super().wait(timeout)


class WatchedEngine(Engine):
    """Its bell is watched, and a request can come in at the moment at which the inbox was found empty."""

    def __init__(self, config: EngineConfig, model: Model | None = None) -> None:
        self.bell = Bell()
        self.inbox = Inbox(self)
        self.set_up = threading.Event()
        cpu, model = torch.device("cpu"), model or HashModel()
        loop, limits = build_loop(model, config, CpuDevice(), make_sampler(cpu), torch.float32)
        super().__init__(loop, Admission(limits, ModelFacts(model.vocab_size, model.eos_token_ids), config.seed))
        self.set_up.wait()

    def _run(self) -> None:
        self._wake, self._inbox = self.bell, self.inbox
        self.set_up.set()
        super()._run()


class Inbox(queue.SimpleQueue[Any]):
    """Remembers whether the bell had been rung when something was put in."""

    def __init__(self, engine: WatchedEngine) -> None:
        self._engine = engine
        self.late: list[Request] = []
        self.rung: list[bool] = []

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        self.rung.append(self._engine.bell.is_set())
        super().put(item, block, timeout)

    def empty(self) -> bool:
        found = super().empty()
        if found and self.late:
            self._engine.submit([self.late.pop()])
        return found


def test_an_idle_engine_waits_for_the_bell_without_looking_up():
    engine = WatchedEngine(EngineConfig(max_rows=8, num_blocks=200, device="cpu"))
    for turn in range(3):
        eventually(lambda: len(engine.bell.timeouts) > turn)  # noqa: B023
        request = engine.admission.make_request([1], GREEDY)
        engine.submit([request])
        collect(engine, [request])
    engine.close()
    assert set(engine.bell.timeouts) == {None}


def test_a_request_that_comes_when_the_inbox_was_just_found_empty_is_not_slept_through():
    engine = WatchedEngine(EngineConfig(max_rows=8, num_blocks=200, device="cpu"))
    first, late = engine.admission.make_request([1], GREEDY), engine.admission.make_request([2], GREEDY)
    engine.inbox.late.append(late)
    engine.submit([first])
    tokens, _ = collect(engine, [first, late])
    assert tokens[late.request_id] == expected_tokens([2], 21, [])
    engine.close()


def test_the_bell_rings_once_everything_is_in_the_inbox():
    """Rung before, it could be heard and the inbox found empty: then what comes would be slept through."""
    model = GatedModel()
    engine = WatchedEngine(EngineConfig(max_rows=8, num_blocks=200, device="cpu"), model)
    requests = [engine.admission.make_request([n], GREEDY) for n in (1, 2)]
    engine.submit(requests)
    assert model.entered.wait(30)  # the bell was heard
    engine.cancel([request.request_id for request in requests])
    model.gate.set()
    _, ends = collect(engine, requests)
    assert {end.reason for end in ends.values()} == {FinishReason.CANCELLED}
    assert engine.inbox.rung == [False] * 4
    engine.close()


def test_an_idle_engine_uses_no_cpu():
    others = set(threading.enumerate())
    engine = make_engine()
    request = engine.admission.make_request([1], GREEDY)
    engine.submit([request])
    collect(engine, [request])
    [thread] = [t for t in set(threading.enumerate()) - others if t.name == "gapless-engine"]
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    settled = time.clock_gettime(clock)
    spin_until = time.process_time() + 0.3
    while time.process_time() < spin_until:
        pass
    assert time.clock_gettime(clock) - settled < 0.02  # of the 0.3 s of CPU time that this thread has used
    engine.close()


def test_a_cancel_between_two_steps_ends_the_request_with_its_one_terminal_event():
    model = GatedModel()
    engine = make_engine(model)
    try:
        running, queued = (engine.admission.make_request([n], GREEDY) for n in (1, 2))
        engine.submit([running])
        assert model.entered.wait(30)  # its first step is in flight
        engine.submit([queued])
        engine.cancel([running.request_id, queued.request_id, running.request_id, 12345])
        model.gate.set()
        tokens, ends = collect(engine, [running, queued])
        assert {end.reason for end in ends.values()} == {FinishReason.CANCELLED}
        assert ends[running.request_id].generated == len(tokens[running.request_id])
        again = engine.admission.make_request([3], GREEDY)
        engine.submit([again])
        tokens, ends = collect(engine, [again])
        assert tokens[again.request_id] == expected_tokens([3], 21, [])
    finally:
        engine.close()


class PausingModel(GatedModel):
    """Stands still in one of its steps only."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        self.left -= 1
        return super().forward(tokens_T, kv, batch) if self.left == -1 else HashModel.forward(self, tokens_T, kv, batch)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("known", [0, 1, 5, 8])
def test_a_cancel_takes_effect_with_the_step_in_hand(lookahead: int, known: int):
    """Only that step and those launched behind it run, and no more tokens come than they bring."""
    model = PausingModel(known)
    engine = make_engine(model, lookahead=lookahead)
    request = engine.admission.make_request([1], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    engine.submit([request])
    assert model.entered.wait(30)
    eventually(lambda: engine.stats().scheduler.steps > known + lookahead)  # all that may be launched
    engine.cancel([request.request_id])
    model.gate.set()
    tokens, ends = collect(engine, [request])
    assert known <= len(tokens[request.request_id]) == ends[request.request_id].generated <= known + 1 + lookahead
    engine.close()  # which waits for the steps in flight
    assert engine.stats().scheduler.steps <= known + 1 + lookahead


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_failing_kernel_ends_the_engine_and_tells_everybody(lookahead: int, steps: int):
    engine = make_engine(FailingModel(steps), lookahead=lookahead)
    requests = [engine.admission.make_request([n], GREEDY) for n in range(3)]
    engine.submit(requests)
    with pytest.raises(EngineDeadError, match="ArithmeticError: a kernel went wrong") as caught:
        collect(engine, requests)
    assert isinstance(caught.value.__cause__, ArithmeticError)
    with pytest.raises(EngineDeadError, match="a kernel went wrong"):
        engine.submit(requests)
    assert not engine.alive
    engine.close()
    healthy = make_engine()
    request = healthy.admission.make_request([5], GREEDY)
    healthy.submit([request])
    assert collect(healthy, [request])[0][request.request_id] == expected_tokens([5], 21, [])
    healthy.close()


@pytest.mark.parametrize("wait", [True, False])
def test_who_asks_a_dead_engine_for_more_is_told_again_and_again(wait: bool):
    engine = make_engine(FailingModel(2))
    engine.submit([engine.admission.make_request([1], GREEDY)])
    while not isinstance(engine.next_output(), EngineFailure):
        pass
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="a kernel went wrong") as caught:
            engine.next_output(wait=wait)
        assert isinstance(caught.value.__cause__, ArithmeticError)


class BrokenDevice(CpuDevice):
    """Fails again when it is closed, as a GPU does after an illegal access."""

    def close(self) -> None:
        super().close()
        raise OSError("the device is gone")


def test_waiters_are_told_even_if_the_device_can_not_be_closed():
    config = EngineConfig(max_rows=8, num_blocks=200, device="cpu")
    sampler = make_sampler(torch.device("cpu"))
    engine = build_engine(FailingModel(2), config, BrokenDevice(), sampler, torch.float32)
    request = engine.admission.make_request([1], GREEDY)
    engine.submit([request])
    with pytest.raises(EngineDeadError, match="ArithmeticError: a kernel went wrong"):
        collect(engine, [request])


def test_a_process_that_leaves_a_running_engine_behind_ends_cleanly():
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_core import GREEDY, make_engine\n"
        "engine = make_engine()\n"
        "engine.submit([engine.admission.make_request([n], GREEDY) for n in range(60)])\n"
        "engine.outputs.get()\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, str(here), str(here.parent)]
    ended = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_closed_engine_gives_its_model_back_and_can_itself_be_collected():
    model = HashModel()
    engine = make_engine(model)
    request = engine.admission.make_request([1], GREEDY)
    engine.submit([request])
    collect(engine, [request])
    held, ended = weakref.ref(model), weakref.ref(engine)
    del model
    engine.close()
    gc.collect()
    assert held() is None  # though somebody still holds the engine
    del engine
    gc.collect()
    assert ended() is None


def test_closing_ends_unfinished_requests_with_an_error_and_may_be_repeated():
    model = GatedModel()
    engine = make_engine(model)
    request = engine.admission.make_request([1], GREEDY)
    engine.submit([request])
    assert model.entered.wait(30)
    closer = threading.Thread(target=engine.close)
    closer.start()
    model.gate.set()
    closer.join(30)
    engine.close()
    with pytest.raises(EngineDeadError, match="closed"):
        collect(engine, [request])
    with pytest.raises(EngineDeadError, match="closed"):
        engine.submit([request])


def test_the_stats_count_tokens_and_the_time_that_the_device_is_busy(engine: Engine):
    requests = [engine.admission.make_request([n], GREEDY) for n in range(8)]
    engine.submit(requests)
    collect(engine, requests)
    stats = engine.stats()
    assert 0.0 < stats.busy_share <= 1.0
    assert stats.scheduler.generated_tokens == 160
    assert stats.scheduler.prompt_tokens == 8


def test_lookahead_can_be_lowered_but_not_past_the_slots(engine: Engine):
    engine.set_lookahead(0)
    engine.set_lookahead(1)
    with pytest.raises(ConfigError, match="0 to 1"):
        engine.set_lookahead(2)


def test_a_cache_that_does_not_fit_is_an_out_of_memory_error():
    with pytest.raises(ConfigError, match="KV cache of 2 bytes is too small"):
        make_engine(num_blocks=None, kv_cache_bytes=2)
    with pytest.raises(OutOfMemoryError, match="KV cache"):
        make_engine(num_blocks=2**50)


def test_a_context_limit_beyond_the_model_is_refused():
    with pytest.raises(ConfigError, match="more than the model's context limit of 128"):
        make_engine(max_model_len=129)
