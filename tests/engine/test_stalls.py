"""A device that ends no step: whoever waits is told after stall_seconds, and nothing waits for that device again."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from engine.test_core import GREEDY, make_engine
from engine.test_faults import assert_healthy
from frontend.tiny import tiny_engine
from gapless import LLM, AsyncLLM, EngineConfig, SamplingParams
from gapless.attention.base import AttentionBatch, LayerKV
from gapless.engine.core import EngineFailure
from gapless.errors import ConfigError, EngineDeadError
from gapless.outcome import Committed
from gapless.request import Request
from support.hash_model import HashModel
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
    requests = [engine.make_request([n], GREEDY) for n in range(3)]
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
    engine.submit([engine.make_request([1], GREEDY)])
    while not isinstance(engine.next_output(), EngineFailure):
        pass
    stuck.gate.set()
    eventually(lambda: not any(each.name == "gapless-engine" for each in threading.enumerate()))
    records: list[object] = []
    while (record := engine.next_output(wait=False)) is not None:
        records.append(record)
    assert not any(isinstance(record, EngineFailure) for record in records)


def test_an_idle_engine_does_not_stall():
    engine = make_engine(stall_seconds=1e-9)
    for _ in range(100):
        engine.check_alive()
        assert engine.next_output(wait=False) is None
    engine.close()


def test_closing_a_stalled_engine_waits_no_longer_than_that(stuck: StuckModel):
    engine = make_engine(stuck, stall_seconds=SHORT)
    engine.submit([engine.make_request([1], GREEDY)])
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
    async def read(llm: AsyncLLM, number: int) -> None:
        async for _ in llm.generate([number], LONG):
            pass

    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine(stuck, stall_seconds=SHORT)) as llm:
            ends = await asyncio.gather(*(read(llm, number) for number in range(5)), return_exceptions=True)
            assert all(isinstance(end, EngineDeadError) and SAYS in str(end) for end in ends)
            with pytest.raises(EngineDeadError, match=SAYS):
                llm.generate([1])

    asyncio.run(scenario())


def test_without_a_limit_a_stall_is_waited_for(stuck: StuckModel):
    engine = make_engine(stuck, stall_seconds=0)
    request: Request = engine.make_request([1], GREEDY)
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
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from engine.test_stalls import LONG, SHORT, StuckModel, tiny_engine\n"
        "from gapless import LLM\n"
        "from gapless.errors import EngineDeadError\n"
        "llm = LLM.from_loaded(tiny_engine(StuckModel(), stall_seconds=SHORT))\n"
        "try:\n    llm.generate([1, 2, 3], LONG)\n"
        "except EngineDeadError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parents[1])]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert SAYS in ended.stdout
