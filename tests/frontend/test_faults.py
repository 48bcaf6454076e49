"""Consumers that fail, stop reading or lose their event loop: nobody else notices, and nothing hangs."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
from torch import Tensor

from frontend.tiny import TripModel, answer, engine_of, num_held_blocks, tiny_engine
from gapless import LLM, AsyncLLM, RequestOutput, SamplingParams
from gapless.async_llm import RequestStream
from gapless.attention.base import AttentionBatch, LayerKV
from gapless.errors import EngineDeadError
from gapless.loading import Loaded
from support.hash_model import HashModel
from support.waiting import eventually

GREEDY = SamplingParams(temperature=0, max_tokens=20)
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
PROMPTS = [[1 + i % 40, 2, 3 + i % 7] for i in range(10)]


class ConsumerError(Exception):
    """What a caller's own code raises."""


class HeldModel(HashModel):
    """Stands still at its sixth step until it is let go, and then fails or goes on."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.left = 5
        self.gate = threading.Event()
        self.fails = fails

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        self.left -= 1
        if self.left < 0:
            assert self.gate.wait(30)
            if self.fails:
                raise RuntimeError("the model failed")
        return super().forward(tokens_T, kv, batch)


def all_is_given_back(loaded: Loaded) -> bool:
    """Whether the engine is idle and holds no block."""
    return loaded.engine.stats().seconds_since_progress == 0.0 and num_held_blocks(loaded) == 0


def assert_works(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [each.outputs[0].token_ids for each in outputs] == [answer(prompt, 20) for prompt in PROMPTS]


# ------------------------------------------------------------------------ LLM


def read_stream(llm: LLM) -> None:
    for _ in llm.stream(PROMPTS, LONG):
        raise ConsumerError


def read_results(llm: LLM) -> None:
    for _ in llm.generate_iter(PROMPTS, [GREEDY, *[LONG] * 9]):
        raise ConsumerError


def read_run(llm: LLM) -> None:
    for _ in llm.run([llm.prepare(PROMPTS[0], GREEDY), llm.prepare(PROMPTS[1], LONG)]):
        raise ConsumerError


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("read", [read_stream, read_results, read_run])
def test_an_exception_of_the_consumer_cancels_what_it_was_reading(read: Callable[[LLM], None], lookahead: int):
    with LLM.from_loaded(tiny_engine(lookahead=lookahead)) as llm:
        with pytest.raises(ConsumerError):
            read(llm)
        assert_works(llm)
        eventually(lambda: all_is_given_back(llm.loaded))
        assert llm.stats().scheduler.generated_tokens < 1000


def test_a_source_that_fails_in_the_middle_of_a_run_cancels_what_it_gave():
    with LLM.from_loaded(tiny_engine()) as llm:

        def source() -> Iterator[None]:
            yield None
            raise ConsumerError

        with pytest.raises(ConsumerError):
            list(llm.run(source()))
        assert_works(llm)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_stream_that_nobody_reads_on_ends_by_itself_and_can_be_closed_or_read_later(lookahead: int):
    with LLM.from_loaded(tiny_engine(lookahead=lookahead)) as llm:
        for read_later in (False, True):
            stream = llm.stream(PROMPTS[:3], LONG)
            first = next(stream)
            eventually(lambda: all_is_given_back(llm.loaded))
            assert llm.loaded.engine.outputs.qsize() <= 3 * 100
            if read_later:
                rest = [token for delta in stream if delta.index == first.index for token in delta.token_ids]
                assert first.token_ids + rest == answer(PROMPTS[first.index], 100, ignore_eos=True)
            stream.close()
            assert_works(llm)


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException | None]]:
    """Run it in a thread; the list gets its exception, or None, when it ends."""
    ends: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - looked at by the test
            ends.append(error)
        else:
            ends.append(None)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ends


@pytest.mark.parametrize("dies", [False, True])
def test_who_waits_behind_a_stream_that_nobody_reads_is_told_when_the_engine_ends(dies: bool):
    model = HeldModel(fails=dies)
    with LLM.from_loaded(tiny_engine(model)) as llm:
        stream = llm.stream(PROMPTS[0], LONG)
        next(stream)
        thread, ends = in_thread(lambda: llm.generate(PROMPTS[1], GREEDY))
        model.gate.set()
        if not dies:
            llm.close()
        thread.join(30)
        assert [type(end) for end in ends] == [EngineDeadError]
        stream.close()


def test_who_waits_behind_a_stream_gets_its_turn_when_that_is_closed():
    with LLM.from_loaded(tiny_engine()) as llm:
        stream = llm.stream(PROMPTS[0], LONG)
        next(stream)
        thread, ends = in_thread(lambda: assert_works(llm))
        stream.close()
        thread.join(30)
        assert ends == [None]


def test_a_dead_engine_that_is_still_held_does_not_harm_the_next_one():
    model = TripModel()
    with LLM.from_loaded(tiny_engine(model)) as dead, LLM.from_loaded(tiny_engine()) as other:
        model.steps_left = 4
        with pytest.raises(EngineDeadError, match="the model tripped"):
            dead.generate(PROMPTS, LONG)
        assert_works(other)
        with LLM.from_loaded(tiny_engine()) as fresh:
            assert_works(fresh)
        with pytest.raises(EngineDeadError, match="the model tripped"):
            dead.generate(PROMPTS, LONG)


# ------------------------------------------------------------------- AsyncLLM


async def last(llm: AsyncLLM, prompt: list[int], params: SamplingParams = GREEDY) -> RequestOutput:
    return [output async for output in llm.generate(prompt, params)][-1]


async def assert_works_async(llm: AsyncLLM) -> None:
    outputs = await asyncio.gather(*(last(llm, prompt) for prompt in PROMPTS))
    assert [each.outputs[0].token_ids for each in outputs] == [answer(prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_an_exception_in_one_task_cancels_its_request_and_no_other(lookahead: int):
    async def fail(llm: AsyncLLM, prompt: list[int]) -> None:
        async for _ in llm.generate(prompt, LONG):
            raise ConsumerError

    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine(lookahead=lookahead)) as llm:
            failing = [fail(llm, [30, number]) for number in range(5)]
            others = [last(llm, prompt) for prompt in PROMPTS]
            ends = await asyncio.gather(*failing, *others, return_exceptions=True)
            assert all(isinstance(end, ConsumerError) for end in ends[:5])
            for prompt, end in zip(PROMPTS, ends[5:], strict=True):
                assert isinstance(end, RequestOutput)
                assert end.outputs[0].token_ids == answer(prompt, 20)
            await asyncio.sleep(0)
            await assert_works_async(llm)
            await asyncio.to_thread(eventually, lambda: all_is_given_back(llm.loaded))

    asyncio.run(scenario())


@pytest.mark.parametrize("lookahead", [0, 1])
def test_streams_that_are_read_once_and_never_again_hold_nobody_and_no_more_than_their_tokens(lookahead: int):
    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine(lookahead=lookahead, max_rows=16)) as llm:
            left = [llm.generate([20, number], LONG) for number in range(6)]
            for stream in left:
                await anext(stream)
            await assert_works_async(llm)
            await asyncio.to_thread(eventually, lambda: all_is_given_back(llm.loaded))
            await asyncio.to_thread(eventually, engine_of(llm.loaded).outputs.empty)
            assert llm.stats().scheduler.generated_tokens <= 6 * 100 + 10 * 20
            await left[0].aclose()
            rest = [output async for output in left[1]]
            assert rest[-1].outputs[0].token_ids == answer([20, 1], 100, ignore_eos=True)
            await assert_works_async(llm)

    asyncio.run(scenario())


@pytest.mark.parametrize("lookahead", [0, 1])
def test_an_event_loop_that_is_closed_under_its_requests_has_them_cancelled(lookahead: int):
    model = HeldModel()
    llm = AsyncLLM.from_loaded(tiny_engine(model, lookahead=lookahead))

    async def read_once() -> list[RequestStream]:
        streams = [llm.generate(prompt, LONG) for prompt in PROMPTS[:4]]
        await anext(streams[0])
        return streams

    loop = asyncio.new_event_loop()
    streams = loop.run_until_complete(read_once())
    loop.close()
    model.gate.set()
    eventually(lambda: all_is_given_back(llm.loaded))
    assert llm.stats().scheduler.generated_tokens < 4 * 100
    del streams
    gc.collect()
    llm.close()

    async def again() -> None:
        async with AsyncLLM.from_loaded(tiny_engine(lookahead=lookahead)) as fresh:
            await assert_works_async(fresh)

    asyncio.run(again())


def test_an_event_loop_that_is_closed_before_an_iterator_is_dropped_has_its_request_cancelled():
    model = HeldModel()
    llm = AsyncLLM.from_loaded(tiny_engine(model))

    async def start() -> object:
        return llm.generate(PROMPTS[0], LONG)

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(start())
    loop.close()
    del stream
    gc.collect()
    model.gate.set()
    eventually(lambda: all_is_given_back(llm.loaded))
    llm.close()
