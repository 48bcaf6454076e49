"""AsyncLLM: many requests on one loop, cancelled by leaving, and told when the engine dies."""

import asyncio
import gc
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from frontend.tiny import TripModel, answer, num_held_blocks, tiny_engine, tiny_tokenizer
from gapless import AsyncLLM, RequestOutput, SamplingParams
from gapless.errors import ConfigError, EmptyPromptError, EngineDeadError, InvalidRequestError
from gapless.loading import LoadedEngine
from gapless.outcome import Committed, Finished
from gapless.request import FinishReason

GREEDY = SamplingParams(temperature=0, max_tokens=20)
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
ONE = SamplingParams(temperature=0, max_tokens=1)


def prompt_of(place: int) -> list[int]:
    return [1 + place % 40, 2 + place // 40, 3]


async def last(llm: AsyncLLM, prompt: list[int], params: SamplingParams = GREEDY) -> RequestOutput:
    return [output async for output in llm.generate(prompt, params)][-1]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_two_hundred_requests_at_once_get_their_own_tokens(lookahead: int):
    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine(lookahead=lookahead, max_rows=32)) as llm:
            outputs = await asyncio.gather(*(last(llm, prompt_of(place)) for place in range(200)))
        for place, output in enumerate(outputs):
            assert output.finished
            assert output.outputs[0].token_ids == answer(prompt_of(place), 20)
            assert output.outputs[0].text == tiny_tokenizer().decode(output.outputs[0].token_ids)

    asyncio.run(scenario())


def test_outputs_are_cumulative_delta_or_final():
    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine()) as llm:
            prompt, expected = prompt_of(3), answer(prompt_of(3), 20)
            text = tiny_tokenizer().decode(expected)
            cumulative = [output async for output in llm.generate(prompt, GREEDY)]
            for earlier, later in pairwise(cumulative):
                assert later.outputs[0].text.startswith(earlier.outputs[0].text)
                assert len(later.outputs[0].token_ids) > len(earlier.outputs[0].token_ids)
                assert not earlier.finished
            assert (cumulative[-1].outputs[0].text, cumulative[-1].outputs[0].token_ids) == (text, expected)
            deltas = [output async for output in llm.generate(prompt, GREEDY, output_kind="delta")]
            assert "".join(output.outputs[0].text for output in deltas) == text
            assert [token for output in deltas for token in output.outputs[0].token_ids] == expected
            (final,) = [output async for output in llm.generate(prompt, GREEDY, output_kind="final")]
            assert (final.outputs[0].text, final.outputs[0].token_ids) == (text, expected)

    asyncio.run(scenario())


def test_a_slow_consumer_gets_what_has_gathered_and_holds_nobody():
    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine()) as llm:
            slow = llm.generate(prompt_of(1), GREEDY)
            await last(llm, prompt_of(2), LONG)
            (output,) = [each async for each in slow]
            assert output.outputs[0].token_ids == answer(prompt_of(1), 20)

    asyncio.run(scenario())


async def leave_by_break(llm: AsyncLLM) -> None:
    async for _ in llm.generate(prompt_of(0), LONG):
        break


async def leave_by_aclose(llm: AsyncLLM) -> None:
    stream = llm.generate(prompt_of(0), LONG)
    await anext(stream)
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def leave_by_cancelling_the_task(llm: AsyncLLM) -> None:
    started = asyncio.Event()

    async def consume() -> None:
        async for _ in llm.generate(prompt_of(0), LONG):
            started.set()

    task = asyncio.create_task(consume())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_without_a_single_step(llm: AsyncLLM) -> None:
    llm.generate(prompt_of(0), LONG)


@pytest.mark.parametrize(
    "leave", [leave_by_break, leave_by_aclose, leave_by_cancelling_the_task, leave_without_a_single_step]
)
def test_leaving_cancels_the_request_and_frees_its_blocks(leave: Callable[[AsyncLLM], Coroutine[Any, Any, None]]):
    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine()) as llm:
            await leave(llm)
            # The cancel may still be on its way; requests that come after it are seen after it.
            await asyncio.sleep(0)
            await last(llm, [5], ONE)
            assert num_held_blocks(llm.loaded) == 0
            assert llm.stats().scheduler.generated_tokens < 100
            assert (await last(llm, prompt_of(7))).outputs[0].token_ids == answer(prompt_of(7), 20)

    asyncio.run(scenario())


def test_a_bad_request_raises_at_once_and_queues_nothing():
    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine()) as llm:
            with pytest.raises(EmptyPromptError):
                llm.generate([], GREEDY)
            with pytest.raises(InvalidRequestError, match="output_kind"):
                llm.generate([1], GREEDY, output_kind="all")  # pyright: ignore[reportArgumentType]
            assert llm.stats().scheduler.steps == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_dying_engine_ends_every_iterator_with_an_error_and_a_new_one_works(lookahead: int):
    async def scenario() -> None:
        model = TripModel()
        async with AsyncLLM.from_loaded(tiny_engine(model, lookahead=lookahead)) as llm:
            idle = llm.generate(prompt_of(50), LONG)
            model.steps_left = 6
            ends = await asyncio.gather(
                *(last(llm, prompt_of(place), LONG) for place in range(20)), return_exceptions=True
            )
            assert all(isinstance(end, EngineDeadError) for end in ends)
            assert len({id(end) for end in ends}) == 20
            assert "the model tripped" in str(ends[0])
            with pytest.raises(EngineDeadError):
                async for _ in idle:
                    pass
            with pytest.raises(EngineDeadError, match="the model tripped"):
                llm.generate(prompt_of(0), GREEDY)
            assert llm.num_open == 0
        async with AsyncLLM.from_loaded(tiny_engine(lookahead=lookahead)) as fresh:
            assert (await last(fresh, prompt_of(1))).outputs[0].token_ids == answer(prompt_of(1), 20)

    asyncio.run(scenario())


def test_closing_ends_waiting_iterators_with_an_error():
    async def scenario() -> None:
        llm = AsyncLLM.from_loaded(tiny_engine())
        stream = llm.generate(prompt_of(0), LONG)
        await anext(stream)
        await llm.aclose()
        with pytest.raises(EngineDeadError, match="closed"):
            async for _ in stream:
                pass

    asyncio.run(scenario())


def test_a_second_event_loop_is_refused():
    llm = AsyncLLM.from_loaded(tiny_engine())

    async def use() -> None:
        await last(llm, prompt_of(0))

    asyncio.run(use())
    with pytest.raises(InvalidRequestError, match="another event loop"):
        asyncio.run(use())
    llm.close()


def test_two_readers_of_one_iterator_are_refused():
    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine()) as llm:
            stream = llm.generate(prompt_of(0), GREEDY, output_kind="final")
            ends = await asyncio.gather(anext(stream), anext(stream), return_exceptions=True)
            assert sum(isinstance(end, InvalidRequestError) for end in ends) == 1

    asyncio.run(scenario())


def test_cancelling_from_another_task_releases_the_reader():
    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine()) as llm:
            stream = llm.generate(prompt_of(0), LONG, output_kind="final")
            reader = asyncio.create_task(anext(stream, None))
            await asyncio.sleep(0)
            stream.cancel()
            assert await reader is None

    asyncio.run(scenario())


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts the calls that other threads hand over."""

    handed_over = 0

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, **more: Any) -> asyncio.Handle:
        self.handed_over += callback.__name__ == "_deliver"
        return super().call_soon_threadsafe(callback, *args, **more)


def test_the_loop_gets_one_call_per_step_however_many_requests_run():
    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine(max_rows=32)) as llm:
            await asyncio.gather(*(last(llm, prompt_of(place), LONG) for place in range(32)))
            loop = asyncio.get_running_loop()
            assert isinstance(loop, CountingLoop)
            stats = llm.stats().scheduler
            assert stats.generated_tokens == 3200
            assert loop.handed_over <= stats.steps

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        runner.run(scenario())


def test_an_unknown_option_is_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="unknown engine option"):
        asyncio.run(AsyncLLM.create("demo", tensor_parallel=2))  # pyright: ignore[reportCallIssue]


def test_an_iterator_keeps_its_engine_alive_when_nobody_else_holds_the_llm():
    async def scenario() -> None:
        stream = AsyncLLM.from_loaded(tiny_engine()).generate(prompt_of(5), GREEDY, output_kind="final")
        gc.collect()
        (output,) = [output async for output in stream]
        assert output.outputs[0].token_ids == answer(prompt_of(5), 20)

    asyncio.run(scenario())


def test_an_engine_ends_when_the_last_who_could_use_it_is_gone():
    async def scenario() -> LoadedEngine:
        loaded = tiny_engine()
        llm = AsyncLLM.from_loaded(loaded)
        await last(llm, prompt_of(5))
        return loaded

    loaded = asyncio.run(scenario())
    gc.collect()
    loaded.engine.close()  # returns, since the engine has been told to stop
    assert not loaded.engine.alive


def test_a_record_that_does_not_fit_ends_every_iterator_with_an_error():
    async def scenario() -> None:
        loaded = tiny_engine()
        async with AsyncLLM.from_loaded(loaded) as llm:
            stream = llm.generate(prompt_of(5), LONG)
            await anext(stream)
            wrong = Finished(int(stream.request_id), FinishReason.STOP, generated=10**6)
            nothing = np.zeros(0, dtype=np.int64)
            loaded.engine.outputs.put(Committed(nothing, nothing.astype(np.int32), (wrong,)))
            with pytest.raises(EngineDeadError, match="makes no sense"):
                async for _ in stream:
                    pass

    asyncio.run(scenario())
