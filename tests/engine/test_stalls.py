"""A device that ends no step: whoever waits is told after stall_seconds, and nothing waits for that device again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from torch import Tensor

from engine.test_core import GREEDY, collect, make_engine
from engine.test_faults import assert_healthy
from frontend.tiny import tiny_engine
from gapless import LLM, AsyncLLM, EngineConfig, SamplingParams
from gapless.attention.base import AttentionBatch, LayerKV
from gapless.engine.core import Engine, EngineFailure
from gapless.errors import ConfigError, EngineDeadError
from gapless.outcome import Committed
from gapless.request import Request
from support.hash_model import HashModel, expected_tokens
from support.waiting import eventually

LOOKAHEADS = [0, 1, 2]
SHORT = 0.2
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
SAYS = "the device has made no progress for 0.2 s"


class StuckModel(HashModel):
    """Stands still at its fifth step until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 4
        self.gate = threading.Event()
        self.stands = threading.Event()

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        self.left -= 1
        if self.left < 0:
            self.stands.set()
            self.gate.wait()
        return super().forward(tokens_T, kv, batch)


class InterruptingModel(StuckModel):
    """Presses Ctrl-C when it stands still."""

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(tokens_T, kv, batch)


class LineModel(StuckModel):
    """Its fifth step says so on stdout and ends when a line comes in on stdin."""

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        if self.left == 0:
            print("stands", flush=True)
            sys.stdin.readline()
            self.gate.set()
        return super().forward(tokens_T, kv, batch)


def python(script: str) -> list[str]:
    """The command that runs a script beside these tests."""
    return [sys.executable, "-c", f"import sys; sys.path[:0] = sys.argv[1:]\n{script}", str(Path(__file__).parents[1])]


async def read(llm: AsyncLLM, number: int) -> None:
    async for _ in llm.generate([number], LONG):
        pass


INTERRUPTED = [
    "LLM.from_loaded(loaded).generate([1], LONG)",
    "llm = LLM.from_loaded(loaded)\ntry:\n    llm.generate([1], LONG)\nfinally:\n    llm.close()",
    "async def main():\n    async with AsyncLLM.from_loaded(loaded) as llm:\n        await read(llm, 1)\n"
    "asyncio.run(main())",
]


@pytest.fixture
def stuck() -> Iterator[StuckModel]:
    others = set(threading.enumerate())
    model = StuckModel()
    yield model
    model.gate.set()
    for thread in set(threading.enumerate()) - others:
        thread.join(30)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_those_who_wait_for_a_stalled_engine_are_told_and_the_next_engine_works(stuck: StuckModel, lookahead: int):
    engine = make_engine(stuck, lookahead=lookahead, stall_seconds=SHORT)
    requests = [engine.admission.make_request([n], GREEDY) for n in range(3)]
    engine.submit(requests)
    record = engine.next_output()
    while isinstance(record, Committed):
        record = engine.next_output()
    assert isinstance(record, EngineFailure)
    assert SAYS in str(record.error)
    assert isinstance(record.error.__cause__, TimeoutError)
    assert not engine.alive
    with pytest.raises(EngineDeadError, match=SAYS):
        engine.submit(requests)
    engine.close()
    assert_healthy(make_engine(lookahead=lookahead))


def test_a_stalled_engine_that_goes_on_after_all_ends_without_another_word(stuck: StuckModel):
    engine = make_engine(stuck, stall_seconds=SHORT)
    engine.submit([engine.admission.make_request([1], GREEDY)])
    while not isinstance(engine.next_output(), EngineFailure):
        pass
    stuck.gate.set()
    eventually(lambda: not any(each.name == "gapless-engine" for each in threading.enumerate()))
    assert not any(isinstance(record, EngineFailure) for record in read_out(engine))


def test_an_engine_that_goes_on_once_it_was_found_overdue_lives(stuck: StuckModel):
    engine = make_engine(stuck, stall_seconds=SHORT)
    request = engine.admission.make_request([1], GREEDY)
    engine.submit([request])
    assert stuck.stands.wait(30)
    eventually(lambda: engine.stats().seconds_since_progress > 3 * SHORT)  # nobody has looked so far
    engine.check_alive()
    stuck.gate.set()
    assert collect(engine, [request])[0][request.request_id] == expected_tokens([1], 21, [])
    engine.check_alive()
    engine.close()


def read_out(engine: Engine) -> Iterator[object]:
    """What a dead engine has left to say."""
    with suppress(EngineDeadError):
        while True:
            yield engine.next_output()


class Meeting(float):
    """A time that two threads must be about to tell before either does."""

    meeting = threading.Barrier(2)

    def __format__(self, spec: str, /) -> str:
        with suppress(threading.BrokenBarrierError):
            self.meeting.wait(5)
        return super().__format__(spec)


def test_two_threads_that_find_the_stall_at_once_publish_one_failure(stuck: StuckModel):
    engine = make_engine(stuck, stall_seconds=Meeting(SHORT))
    engine.submit([engine.admission.make_request([1], GREEDY)])
    assert stuck.stands.wait(30)
    threads = [threading.Thread(target=engine.close) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not Meeting.meeting.broken
    assert sum(isinstance(record, EngineFailure) for record in read_out(engine)) == 1


@pytest.mark.skipif(os.name != "posix", reason="signals of job control")
def test_a_process_that_was_suspended_goes_on():
    script = (
        "from engine.test_stalls import LONG, LineModel, tiny_engine\n"
        "from gapless import LLM\n"
        "llm = LLM.from_loaded(tiny_engine(LineModel(), stall_seconds=1.0))\n"
        "print(len(llm.generate([1, 2, 3], LONG)[0].outputs[0].token_ids))\n"
    )
    with subprocess.Popen(python(script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "stands\n"
        child.send_signal(signal.SIGSTOP)
        until = time.monotonic() + 1.5
        eventually(lambda: time.monotonic() > until)
        child.stdin.write("\n")
        child.stdin.flush()
        child.send_signal(signal.SIGCONT)
        assert child.communicate(timeout=60)[0] == "100\n"
    assert child.returncode == 0


def test_an_interrupted_process_with_a_hung_device_ends_without_waiting_for_it():
    """Their stall_seconds are longer than the patience of this test."""
    script = (
        "import asyncio\n"
        "from engine.test_stalls import LONG, InterruptingModel, read, tiny_engine\n"
        "from gapless import LLM, AsyncLLM\n"
        "loaded = tiny_engine(InterruptingModel(), stall_seconds=600.0)\n"
    )
    children = [subprocess.Popen(python(script + lines), stderr=subprocess.PIPE, text=True) for lines in INTERRUPTED]
    try:
        for child in children:
            _, told = child.communicate(timeout=60)
            assert child.returncode == -signal.SIGINT, told
            assert told.endswith("KeyboardInterrupt\n")
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_a_close_that_is_interrupted_leaves_an_engine_that_can_be_waited_for(stuck: StuckModel):
    """Or the interpreter would end while the engine's thread is inside torch, which aborts the process."""
    others = set(threading.enumerate())
    engine = make_engine(stuck)
    [thread] = [each for each in set(threading.enumerate()) - others if each.name == "gapless-engine"]
    engine.submit([engine.admission.make_request([1], GREEDY)])
    assert stuck.stands.wait(30)

    def interrupt() -> None:
        eventually(lambda: not engine.alive)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    assert thread.is_alive()
    stuck.gate.set()
    engine.close()
    assert not thread.is_alive()


def test_an_idle_engine_does_not_stall():
    engine = make_engine(stall_seconds=1e-9)
    for _ in range(100):
        engine.check_alive()
        assert engine.next_output(wait=False) is None
    engine.close()


def test_closing_a_stalled_engine_waits_no_longer_than_that(stuck: StuckModel):
    engine = make_engine(stuck, stall_seconds=SHORT)
    engine.submit([engine.admission.make_request([1], GREEDY)])
    assert stuck.stands.wait(30)
    engine.close()
    assert not stuck.gate.is_set()
    with pytest.raises(EngineDeadError, match=SAYS):
        engine.check_alive()


def test_an_llm_tells_who_reads_and_who_waits_for_a_turn(stuck: StuckModel):
    with LLM.from_loaded(tiny_engine(stuck, stall_seconds=SHORT)) as llm:
        stream = llm.stream([1, 2, 3], LONG)
        next(stream)
        ends: list[BaseException] = []

        def wait_for_the_turn() -> None:
            try:
                llm.generate([4, 5, 6], LONG)
            except EngineDeadError as error:
                ends.append(error)

        waiter = threading.Thread(target=wait_for_the_turn)
        waiter.start()
        waiter.join(30)  # though nobody reads the stream
        assert [SAYS in str(end) for end in ends] == [True]
        with pytest.raises(EngineDeadError, match=SAYS):
            list(stream)
        with pytest.raises(EngineDeadError, match=SAYS):
            llm.generate([4, 5, 6], LONG)


def test_an_async_llm_tells_every_task(stuck: StuckModel):
    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine(stuck, stall_seconds=SHORT)) as llm:
            ends = await asyncio.gather(*(read(llm, number) for number in range(5)), return_exceptions=True)
            assert all(isinstance(end, EngineDeadError) and SAYS in str(end) for end in ends)
            with pytest.raises(EngineDeadError, match=SAYS):
                llm.generate([1])

    asyncio.run(scenario())


def test_without_a_limit_a_stall_is_waited_for(stuck: StuckModel):
    engine = make_engine(stuck, stall_seconds=0)
    request: Request = engine.admission.make_request([1], GREEDY)
    engine.submit([request])
    eventually(lambda: engine.stats().seconds_since_progress > SHORT)
    engine.check_alive()
    stuck.gate.set()
    tokens = 0
    while tokens < 20:
        record = engine.next_output()
        assert isinstance(record, Committed)
        tokens += record.tokens.size
    engine.close()


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_a_limit_must_be_a_time(seconds: float):
    with pytest.raises(ConfigError, match="stall_seconds"):
        EngineConfig(stall_seconds=seconds)


def test_a_process_with_a_stalled_engine_ends():
    script = (
        "from engine.test_stalls import LONG, SHORT, StuckModel, tiny_engine\n"
        "from gapless import LLM\n"
        "from gapless.errors import EngineDeadError\n"
        "llm = LLM.from_loaded(tiny_engine(StuckModel(), stall_seconds=SHORT))\n"
        "try:\n    llm.generate([1, 2, 3], LONG)\n"
        "except EngineDeadError as error:\n    print(error)\n"
    )
    ended = subprocess.run(python(script), capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert SAYS in ended.stdout
