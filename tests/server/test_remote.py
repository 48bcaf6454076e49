"""An engine behind a socket gives what one in this process gives."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import socket
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from frontend.tiny import num_held_blocks, tiny_engine
from gapless.async_llm import AsyncLLM
from gapless.engine.admission import Admission
from gapless.errors import ConfigError, EngineDeadError, InternalError, InvalidRequestError, ModelNotFoundError
from gapless.forms import Forms
from gapless.loading import Loaded, LoadedEngine
from gapless.outcome import Committed, Finished, LogprobLines, PromptLogprobs
from gapless.outputs import RequestOutput
from gapless.params import SamplingParams
from gapless.prompts import Prompt
from gapless.request import FinishReason, Form
from gapless.server.engine_process import EngineServer
from gapless.server.messages import Answer, FromEngine, Message, Step, ToEngine, Wire, pack_step, unpack_step
from gapless.server.remote import RemoteEngine, error_of, pack_request

CASES: list[tuple[Prompt, SamplingParams]] = [
    ([3, 1, 4], SamplingParams(temperature=0, max_tokens=20)),
    ("a b c", SamplingParams(seed=5, max_tokens=30, top_k=5, top_p=0.9, min_p=0.01)),
    ([9, 9], SamplingParams(n=3, seed=1, max_tokens=12)),
    ([9, 8], SamplingParams(n=2, seed=1, max_tokens=6, prompt_logprobs=2, logprobs=3)),
    ([5, 6, 7, 8], SamplingParams(temperature=0, max_tokens=16, logprobs=2)),
    ("abc", SamplingParams(seed=3, max_tokens=16, stop=["b", "zz"], include_stop_str_in_output=True)),
    ("abc", SamplingParams(seed=3, max_tokens=16, echo=True, min_tokens=5, stop_token_ids=(7,))),
    ([1, 2], SamplingParams(seed=4, max_tokens=16, repetition_penalty=1.3, presence_penalty=0.5, logit_bias={4: 2.0})),
    ([1, 2], SamplingParams(seed=4, max_tokens=16, bad_words=["a"], frequency_penalty=-0.5)),
    ([1, 2], SamplingParams(seed=4, max_tokens=16, allowed_token_ids=(3, 4, 5), ignore_eos=True)),
    ([1, 2], SamplingParams(seed=6, max_tokens=16, regex="[a-c]{3}")),
    ([1, 2], SamplingParams(seed=6, n=2, max_tokens=16, choice=["abc", "cab"])),
]


class Pair:
    """A served engine, and what is in front of it."""

    def __init__(self, served: LoadedEngine) -> None:
        ours, theirs = socket.socketpair()
        self.served = served
        self.server = EngineServer(Wire(theirs, ToEngine), served, None)
        self.status: list[int] = []
        self.thread = threading.Thread(target=lambda: self.status.append(self.server.serve()))
        self.thread.start()
        admission = served.engine.admission
        self.remote = RemoteEngine(Wire(ours, FromEngine), Admission(admission.limits, admission.model, 0))
        self.llm = AsyncLLM.from_loaded(
            Loaded(self.remote, served.tokenizer, served.chat_template, "tiny", "cpu", served.config)
        )


@asynccontextmanager
async def paired(lookahead: int = 0) -> AsyncGenerator[Pair]:
    pair = Pair(tiny_engine(lookahead=lookahead))
    pair.llm.attach()
    try:
        yield pair
    finally:
        await pair.llm.aclose()
        await asyncio.to_thread(pair.thread.join)
        pair.served.engine.close()


async def eventually(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        await asyncio.sleep(0.01)


async def final(llm: AsyncLLM, prompt: Prompt, params: SamplingParams) -> RequestOutput:
    output = None
    async for each in llm.generate(prompt, params, output_kind="final"):
        output = each
    assert output is not None
    return output


def same(one: RequestOutput, other: RequestOutput) -> bool:
    """But for the request's number and what the prefix cache had."""
    usage = dataclasses.replace(other.usage, cached_tokens=one.usage.cached_tokens)
    return one == dataclasses.replace(other, request_id=one.request_id, usage=usage)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_answers_are_those_of_an_engine_in_this_process(lookahead: int):
    async def all_of(llm: AsyncLLM) -> list[RequestOutput]:
        return await asyncio.gather(*[final(llm, prompt, params) for prompt, params in CASES])

    async def main() -> None:
        local = tiny_engine(lookahead=lookahead)
        async with AsyncLLM.from_loaded(local) as llm:
            expected = await all_of(llm)
        async with paired(lookahead) as pair:
            answers = await all_of(pair.llm)
            await eventually(lambda: num_held_blocks(pair.served) == 0)
        for (_, params), one, other in zip(CASES, answers, expected, strict=True):
            assert same(one, other), params

    asyncio.run(main())


def run(work: Callable[[Pair], Awaitable[None]], lookahead: int = 0) -> None:
    async def main() -> None:
        async with paired(lookahead) as pair:
            await work(pair)

    asyncio.run(main())


def test_a_request_that_is_left_is_cancelled_over_there():
    async def work(pair: Pair) -> None:
        stream = pair.llm.generate([1, 2], SamplingParams(max_tokens=120, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        await eventually(lambda: num_held_blocks(pair.served) == 0)
        assert pair.served.engine.stats().scheduler.generated_tokens < 120

    run(work)


class SlowForms(Forms):
    """Makes no form before it may."""

    def __init__(self, inner: Forms) -> None:
        self.inner = inner
        self.go_on = threading.Event()

    def form_of(self, params: SamplingParams, prompt: Any, stop_ids: Collection[int]) -> Form | None:
        self.go_on.wait()
        return self.inner.form_of(params, prompt, stop_ids)


def test_a_request_that_waits_for_its_form_holds_up_nobody_and_can_be_cancelled():
    async def work(pair: Pair) -> None:
        forms = SlowForms(pair.served.forms)
        object.__setattr__(pair.served, "forms", forms)
        stream = pair.llm.generate([1, 2], SamplingParams(regex="[a-c]+", n=2))
        forming = pair.server._forming  # pyright: ignore[reportPrivateUsage]
        await eventually(lambda: len(forming) == 2)
        other = await final(pair.llm, [4, 4], SamplingParams(max_tokens=3, ignore_eos=True))
        assert other.finished
        stream.cancel()
        await eventually(lambda: list(forming.values()) == [True, True])
        forms.go_on.set()
        await eventually(lambda: not forming)
        after = await final(pair.llm, [4, 4], SamplingParams(max_tokens=3, ignore_eos=True))
        assert after.finished
        assert pair.served.engine.stats().scheduler.prompt_tokens == 4

    run(work)


def test_a_request_that_no_message_can_hold_harms_nobody_else():
    async def work(pair: Pair) -> None:
        huge = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 10**30}}}
        answered = await final(pair.llm, [1, 2], SamplingParams(regex="[a-c]{2}"))
        assert answered.finished
        with pytest.raises(InvalidRequestError):  # the tiny tokenizer can not spell JSON
            pair.llm.generate([1, 2], SamplingParams(json_schema=huge))
        form = pair.llm.loaded.forms.form_of(SamplingParams(regex="a"), [1], [0])
        admission = pair.llm.loaded.engine.admission
        schema = admission.make_request([1, 2], SamplingParams(json_schema=huge), form=form)
        assert isinstance(pack_request(schema).params["json_schema"], str)
        bad = dataclasses.replace(admission.make_request([1, 2], SamplingParams()), seed=2**70)
        with pytest.raises(InvalidRequestError, match="passed on"):
            pair.remote.submit([bad])
        assert (await final(pair.llm, [4, 4], SamplingParams(max_tokens=3, ignore_eos=True))).finished

    run(work)


def test_commands_go_over_and_their_errors_come_back():
    async def work(pair: Pair) -> None:
        remote = pair.remote
        await asyncio.wrap_future(remote.ask("lookahead", 0))
        stats = await asyncio.to_thread(remote.stats)
        assert stats.lookahead == 0
        with pytest.raises(ConfigError, match="0 to 1"):
            await asyncio.to_thread(remote.set_lookahead, 2)
        await pair.llm.pause()
        waits = asyncio.ensure_future(final(pair.llm, [1], SamplingParams(max_tokens=2, ignore_eos=True)))
        await asyncio.to_thread(remote.stats)
        assert not waits.done()
        await pair.llm.resume()
        assert (await waits).finished
        await pair.llm.sleep()
        await pair.llm.wake()
        assert await asyncio.to_thread(remote.timeline, 5) == []
        with pytest.raises(ConfigError, match="can not be updated"):
            await pair.llm.update_weights({})

    run(work, 1)


def test_when_the_engine_dies_over_there_everybody_is_told():
    async def work(pair: Pair) -> None:
        stream = pair.llm.generate([1, 2], SamplingParams(max_tokens=120, ignore_eos=True))
        await anext(stream)
        pair.served.engine.close()
        with pytest.raises(EngineDeadError, match="closed"):
            async for _ in stream:
                pass
        await eventually(lambda: not pair.remote.alive)
        with pytest.raises(EngineDeadError):
            pair.llm.generate([1], SamplingParams())
        with pytest.raises(EngineDeadError):
            await asyncio.wrap_future(pair.remote.ask("stats"))

    run(work)


def test_what_the_other_side_does_not_know_is_an_error_of_who_asked():
    async def work(pair: Pair) -> None:
        with pytest.raises(InternalError, match="nothing that it knows"):
            await asyncio.wrap_future(pair.remote.ask("nothing that it knows"))
        assert (await final(pair.llm, [4, 4], SamplingParams(max_tokens=3, ignore_eos=True))).finished

    run(work)


def test_who_stops_waiting_for_an_answer_harms_nobody():
    async def work(pair: Pair) -> None:
        asked = asyncio.wrap_future(pair.remote.ask("stats"))
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert (await final(pair.llm, [4, 4], SamplingParams(max_tokens=30, ignore_eos=True))).finished

    run(work)


def test_a_message_is_one_of_its_type_or_an_error():
    ours, theirs = socket.socketpair()
    wire = Wire(theirs, ToEngine)
    for data in (pickle.dumps(print), b"\xc1", b"\x92\xa4Step\xc0", b""):
        ours.sendall(len(data).to_bytes(4, "little") + data)
        with pytest.raises(InternalError, match="makes no sense"):
            wire.receive()
    ours.sendall((2**31).to_bytes(4, "little"))
    with pytest.raises(InternalError, match="too long"):
        wire.receive()
    ours.sendall(b"\x05\x00\x00\x00ab")
    ours.close()
    assert wire.receive() is None  # broken off
    theirs.close()


def test_a_step_is_one_message_however_many_rows_it_has():
    sent: list[Message] = []

    async def work(pair: Pair) -> None:
        monkey = pair.server._send  # pyright: ignore[reportPrivateUsage]
        pair.server._send = lambda message: (sent.append(message), monkey(message))[1]  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        await asyncio.gather(
            *[final(pair.llm, [n + 1], SamplingParams(max_tokens=20, ignore_eos=True)) for n in range(8)]
        )

    run(work, 1)
    steps = [message for message in sent if isinstance(message, Step)]
    tokens = sum(len(step.tokens) // 4 for step in steps)
    assert tokens == 160
    assert len(steps) < 60


def test_errors_keep_their_type_over_the_wire():
    assert isinstance(error_of("ModelNotFoundError", "none"), ModelNotFoundError)
    for name in ("Exception", "annotations", "no such", "KeyboardInterrupt"):
        found = error_of(name, "text")
        assert isinstance(found, InternalError)
        assert "text" in str(found)
    assert Answer(3).error is None


def test_a_step_comes_over_as_it_is():
    generator = np.random.default_rng(0)

    def lines(count: int) -> LogprobLines:
        ids = generator.integers(0, 99, (count, 21), dtype=np.int32)
        return LogprobLines(ids, generator.random((count, 21), dtype=np.float32), ids[:, 0].copy())

    record = Committed(
        np.array([2**40, 7], dtype=np.int64),
        np.array([5, 2**30], dtype=np.int32),
        (Finished(7, FinishReason.STOP, 3, 1, 0), Finished(8, FinishReason.ERROR, 0, error="why")),
        lines(2),
        (PromptLogprobs(7, 1, lines(4)),),
        (2**40,),
    )
    ours, theirs = socket.socketpair()
    Wire(ours, ToEngine).send(pack_step(record))
    back = unpack_step(Wire(theirs, FromEngine).receive())
    assert np.array_equal(back.request_ids, record.request_ids)
    assert np.array_equal(back.tokens, record.tokens)
    assert back.finished == record.finished
    assert back.restarted == record.restarted
    assert back.logprobs is not None
    assert record.logprobs is not None
    for one, other in ((back.logprobs, record.logprobs), (back.prompts[0].lines, record.prompts[0].lines)):
        assert np.array_equal(one.ids_LK, other.ids_LK)
        assert np.array_equal(one.logprobs_LK, other.logprobs_LK)
        assert np.array_equal(one.ranks_L, other.ranks_L)
    ours.close()
    theirs.close()
