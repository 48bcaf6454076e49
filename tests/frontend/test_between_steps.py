"""Pause, new weights and sleep through LLM and AsyncLLM: what callers and streams see of it."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch

from engine.test_between_steps import ChangingModel, expected
from frontend.tiny import engine_of, tiny_engine
from gapless import LLM, AsyncLLM, SamplingParams
from gapless.engine.core import InFlight
from gapless.errors import CorruptModelError

COUNT = 60
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5, 3], [5, 8, 9, 7]]
GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=0)


@pytest.fixture
def model() -> ChangingModel:
    return ChangingModel()


@pytest.fixture
def llm(model: ChangingModel) -> Iterator[LLM]:
    with LLM.from_loaded(tiny_engine(model, lookahead=1, max_rows=3)) as llm:
        yield llm


def change(llm: LLM | AsyncLLM, model: ChangingModel, shift: int, in_flight: InFlight) -> None:
    """Stands for update_weights(), which the hashing model has none for."""
    engine_of(llm.loaded).between_steps(lambda _: setattr(model, "shift", shift), in_flight=in_flight)


def test_a_stream_is_told_that_its_answer_begins_again(llm: LLM, model: ChangingModel):
    tokens: dict[int, list[int]] = defaultdict(list)
    texts: dict[int, str] = defaultdict(str)
    restarted, changed = 0, False
    for delta in llm.stream(PROMPTS, GREEDY):
        if delta.restarted:
            restarted += 1
            tokens[delta.index], texts[delta.index] = [], ""
        tokens[delta.index] += delta.token_ids
        texts[delta.index] += delta.text
        assert delta.logprobs is not None
        assert [each.token_id for each in delta.logprobs] == delta.token_ids
        if not changed and len(tokens[0]) > 5:
            changed = True
            change(llm, model, 7, "restart")
    assert restarted >= 1
    for place, prompt in enumerate(PROMPTS):
        assert tokens[place] == expected(prompt, COUNT, 7)
    wholes = llm.generate(PROMPTS, GREEDY)
    assert [texts[place] for place in range(len(PROMPTS))] == [each.outputs[0].text for each in wholes]


def test_generate_returns_the_answer_that_began_again(llm: LLM, model: ChangingModel):
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=1, prompt_logprobs=0)
    timer = threading.Timer(0.03, change, (llm, model, 7, "restart"))
    timer.start()
    outputs = llm.generate(PROMPTS, params)
    timer.join()
    news = [expected(prompt, COUNT, 7) for prompt in PROMPTS]
    for output, prompt, new in zip(outputs, PROMPTS, news, strict=True):
        answer = output.outputs[0]
        assert answer.token_ids in (new, expected(prompt, COUNT, 0))
        assert answer.logprobs is not None
        assert output.prompt_logprobs is not None
        assert (len(answer.logprobs), len(output.prompt_logprobs)) == (COUNT, len(prompt))
    assert any(output.outputs[0].token_ids == new for output, new in zip(outputs, news, strict=True))


def test_a_pause_from_another_thread_holds_a_call_until_resume(llm: LLM):
    llm.pause()
    answers: list[list[int]] = []
    caller = threading.Thread(target=lambda: answers.append(llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].token_ids))
    caller.start()
    caller.join(0.1)
    assert caller.is_alive()
    llm.resume()
    caller.join(20)
    assert answers == [expected(PROMPTS[0], COUNT, 0)]


def test_sleep_and_wake_change_no_answer(llm: LLM):
    llm.sleep()
    llm.wake()
    assert llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].token_ids == expected(PROMPTS[0], COUNT, 0)


def test_the_asynchronous_front_end_has_the_same(model: ChangingModel):
    async def run() -> None:
        async with AsyncLLM.from_loaded(tiny_engine(model, lookahead=1)) as llm:
            await llm.pause()
            stream = llm.generate(PROMPTS[0], GREEDY, output_kind="delta")
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            await llm.resume()
            tokens = list((await waiting).outputs[0].token_ids)
            await asyncio.to_thread(change, llm, model, 7, "restart")
            async for output in stream:
                [new] = output.outputs
                tokens = [*([] if new.restarted else tokens), *new.token_ids]
            assert tokens == expected(PROMPTS[0], COUNT, 7)
            await llm.sleep()
            await llm.wake()
            await llm.update_weights({})

    asyncio.run(run())


def test_weights_of_a_real_model_are_checked_before_anything_stops():
    with LLM(shape="smollm2-135m", load="random", num_blocks=8, max_rows=2, max_model_len=64) as llm:
        prompt = [1, 2, 3]
        params = SamplingParams(temperature=0, max_tokens=4)
        before = llm.generate(prompt, params)[0].outputs[0].token_ids
        with pytest.raises(CorruptModelError, match=r"'model.norm.weight' has shape \[2\]"):
            llm.update_weights({"model.norm.weight": torch.ones(2)})
        assert llm.generate(prompt, params)[0].outputs[0].token_ids == before
        llm.update_weights({"model.norm.weight": torch.linspace(-1, 1, 576)})
        assert llm.generate(prompt, params)[0].outputs[0].token_ids != before
