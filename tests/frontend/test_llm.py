"""LLM: order, text, streams, refusals, interrupts and the death of its engine."""

import dataclasses
import threading
from collections.abc import Iterator

import pytest

from frontend.tiny import InterruptModel, TripModel, answer, num_held_blocks, tiny_engine, tiny_tokenizer
from gapless import LLM, SamplingParams
from gapless.collector import Prepared
from gapless.config import EngineConfig
from gapless.errors import (
    ConfigError,
    EmptyPromptError,
    EngineDeadError,
    InvalidRequestError,
    PromptTooLongError,
)
from gapless.loading import EngineOptions
from support.hash_model import EOS

GREEDY = SamplingParams(temperature=0, max_tokens=20)
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
PROMPTS = [[1 + i % 40, 2, 3 + i % 7] for i in range(30)]


@pytest.fixture(params=[0, 1])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM.from_loaded(tiny_engine(lookahead=request.param)) as llm:
        yield llm


def test_results_come_in_the_order_of_the_prompts_with_the_right_tokens(llm: LLM):
    outputs = llm.generate(PROMPTS, GREEDY)
    words = tiny_tokenizer()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = answer(prompt, 20)
        assert output.prompt_token_ids == prompt
        assert output.outputs[0].token_ids == expected
        assert output.outputs[0].text == words.decode(expected)
        assert output.outputs[0].finish_reason == ("stop" if expected[-1] == EOS else "length")
        assert (output.usage.prompt_tokens, output.usage.completion_tokens) == (3, len(expected))
        assert output.finished


def test_a_prompt_may_have_any_form(llm: LLM):
    token_ids = tiny_tokenizer().encode("abc")
    outputs = llm.generate(["abc", {"prompt": "abc"}, token_ids, {"prompt_token_ids": token_ids}], GREEDY)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert [output.prompt for output in outputs] == ["abc", "abc", None, None]
    assert llm.generate("abc", GREEDY)[0].outputs == outputs[0].outputs
    assert llm.generate(token_ids, GREEDY)[0].outputs == outputs[0].outputs
    assert llm.generate([], GREEDY) == []


def test_each_prompt_may_have_its_own_parameters(llm: LLM):
    each = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (1, 2, 3)]
    outputs = llm.generate(PROMPTS[:3], each)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3]
    with pytest.raises(InvalidRequestError, match="3 prompts came with 2"):
        llm.generate(PROMPTS[:3], each[:2])


def test_the_deltas_of_a_stream_add_up_to_what_generate_returns(llm: LLM):
    whole = llm.generate(PROMPTS, GREEDY)
    texts, token_ids = [""] * len(PROMPTS), [list[int]() for _ in PROMPTS]
    ended: dict[int, str] = {}
    for delta in llm.stream(PROMPTS, GREEDY):
        assert delta.index not in ended
        texts[delta.index] += delta.text
        token_ids[delta.index] += delta.token_ids
        if delta.finish_reason is not None:
            ended[delta.index] = delta.finish_reason
    assert texts == [output.outputs[0].text for output in whole]
    assert token_ids == [output.outputs[0].token_ids for output in whole]
    assert [ended[place] for place in range(len(PROMPTS))] == [output.outputs[0].finish_reason for output in whole]


def test_a_chat_goes_through_the_template(llm: LLM):
    (output,) = llm.chat([{"role": "user", "content": "hi"}], GREEDY)
    assert output.prompt == "hi\na"
    assert output.outputs == llm.generate("hi\na", GREEDY)[0].outputs
    two = llm.chat([[{"role": "user", "content": text}] for text in ("hi", "ho")], GREEDY)
    assert [each.prompt for each in two] == ["hi\na", "ho\na"]
    with pytest.raises(InvalidRequestError):
        llm.chat([{"role": "user"}, {"content": 3}], GREEDY)


def test_special_tokens_spelled_out_by_a_user_are_text(llm: LLM):
    (output,) = llm.chat([{"role": "user", "content": "<end>"}], GREEDY)
    assert EOS not in output.prompt_token_ids


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ([], EmptyPromptError),
        ("", EmptyPromptError),
        ([1] * 128, PromptTooLongError),
        ([10**6], InvalidRequestError),
        ([-1], InvalidRequestError),
        ([[1]], InvalidRequestError),
        ([1.5], InvalidRequestError),
        ({"promt": "a"}, InvalidRequestError),
        ({"prompt": "a", "messages": []}, InvalidRequestError),
        ({"prompt": 3}, InvalidRequestError),
        ({"messages": "hi"}, InvalidRequestError),
        (None, InvalidRequestError),
        (7, InvalidRequestError),
    ],
)
def test_one_bad_prompt_and_nothing_is_queued(llm: LLM, bad: object, error: type[Exception]):
    prompts: list[object] = ["abc", bad, "abc"]
    for call in (llm.generate, llm.stream, llm.generate_iter):
        with pytest.raises(error, match="prompt 1: "):
            call(prompts, GREEDY)  # pyright: ignore[reportArgumentType]
    assert llm.stats().scheduler.steps == 0
    assert llm.generate("abc", GREEDY)[0].outputs[0].token_ids == answer(tiny_tokenizer().encode("abc"), 20)


def test_results_can_be_had_as_they_finish(llm: LLM):
    counts = [30, 2, 15]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in counts]
    found = [(place, output.usage.completion_tokens) for place, output in llm.generate_iter(PROMPTS[:3], params)]
    assert found == [(1, 2), (2, 15), (0, 30)]


def test_a_long_list_of_work_is_drawn_only_as_room_comes_up(llm: LLM):
    drawn = finished = most = 0

    def source() -> Iterator[Prepared | None]:
        nonlocal drawn, most
        for place in range(60):
            if place % 7 == 0:
                yield None
            drawn += 1
            most = max(most, drawn - finished)
            yield llm.prepare(PROMPTS[place % len(PROMPTS)], GREEDY)

    for _ in llm.run(source(), window=5):
        finished += 1
    assert finished == 60
    assert most <= 5 + 8  # results of the same step as the one that made room are handed out one by one


def test_a_prepared_request_runs_once_and_only_where_it_was_prepared(llm: LLM):
    with LLM.from_loaded(tiny_engine()) as other:
        used, open_twice = llm.prepare(PROMPTS[0], GREEDY), llm.prepare(PROMPTS[1], GREEDY)
        foreign = other.prepare(PROMPTS[2], GREEDY)
        assert len(list(llm.run([used]))) == 1
        steps = llm.stats().scheduler.steps
        for wrong in ([used], [open_twice, open_twice], [foreign], [llm.prepare(PROMPTS[2], GREEDY), foreign]):
            with pytest.raises(InvalidRequestError, match="Call prepare"):
                list(llm.run(wrong))
        assert llm.stats().scheduler.steps == steps
        assert llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].token_ids == answer(PROMPTS[0], 20)


def test_a_request_that_is_given_again_while_it_runs_cancels_that_run_and_no_other(llm: LLM):
    waiting: list[list[int]] = []
    others = threading.Thread(target=lambda: waiting.append(llm.generate(PROMPTS[3], GREEDY)[0].outputs[0].token_ids))
    prepared = llm.prepare(PROMPTS[0], LONG)

    def source() -> Iterator[Prepared | None]:
        yield prepared
        yield None
        others.start()
        yield prepared

    with pytest.raises(InvalidRequestError, match="given to run"):
        list(llm.run(source()))
    others.join()
    assert waiting == [answer(PROMPTS[3], 20)]


def test_leaving_a_stream_cancels_the_rest_and_frees_its_blocks():
    with LLM.from_loaded(tiny_engine()) as llm:
        for delta in llm.stream(PROMPTS[:4], LONG):
            assert delta.finish_reason is None
            break
        generated = llm.stats().scheduler.generated_tokens
        llm.generate([[5]], SamplingParams(temperature=0, max_tokens=1))
        assert num_held_blocks(llm.loaded) == 0
        assert generated < 400


def test_an_open_stream_keeps_its_turn_and_says_so(llm: LLM):
    stream = llm.stream(PROMPTS[:2], LONG)
    next(stream)
    with pytest.raises(InvalidRequestError, match="unfinished stream"):
        llm.generate("abc", GREEDY)
    stream.close()
    assert llm.generate([PROMPTS[0]], GREEDY)[0].outputs[0].token_ids == answer(PROMPTS[0], 20)


def test_threads_take_turns(llm: LLM):
    found: dict[int, list[int]] = {}

    def ask(place: int) -> None:
        found[place] = llm.generate([PROMPTS[place]], GREEDY)[0].outputs[0].token_ids

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {place: answer(PROMPTS[place], 20) for place in range(6)}


def test_an_interrupt_cancels_what_is_unfinished_and_the_llm_goes_on():
    model = InterruptModel()
    with LLM.from_loaded(tiny_engine(model)) as llm:
        model.steps_left = 12
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, LONG)
        outputs = llm.generate(PROMPTS, GREEDY)
        assert [each.outputs[0].token_ids for each in outputs] == [answer(prompt, 20) for prompt in PROMPTS]
        assert num_held_blocks(llm.loaded) == 0


def test_a_source_that_fails_cancels_what_it_gave(llm: LLM):
    def source() -> Iterator[Prepared]:
        yield llm.prepare(PROMPTS[0], LONG)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(llm.run(source()))
    assert llm.generate([PROMPTS[1]], GREEDY)[0].outputs[0].token_ids == answer(PROMPTS[1], 20)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_dead_engine_says_why_to_this_call_and_to_later_ones(lookahead: int):
    model = TripModel()
    with LLM.from_loaded(tiny_engine(model, lookahead=lookahead)) as llm:
        model.steps_left = 5
        with pytest.raises(EngineDeadError, match="the model tripped"):
            llm.generate(PROMPTS, LONG)
        with pytest.raises(EngineDeadError, match="the model tripped"):
            llm.generate(PROMPTS, GREEDY)
        with pytest.raises(EngineDeadError):
            next(llm.stream("abc", GREEDY))
    with LLM.from_loaded(tiny_engine(lookahead=lookahead)) as fresh:
        assert fresh.generate([PROMPTS[0]], GREEDY)[0].outputs[0].token_ids == answer(PROMPTS[0], 20)


def test_a_closed_llm_says_so(llm: LLM):
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("abc", GREEDY)


def test_a_progress_bar_shows_on_request_only(llm: LLM, capsys: pytest.CaptureFixture[str]):
    llm.generate(PROMPTS, GREEDY)
    assert capsys.readouterr().err == ""
    llm.generate(PROMPTS, GREEDY, use_tqdm=True)
    shown = capsys.readouterr().err
    assert "30/30" in shown
    assert "tokens/s" in shown
    assert "running" in shown


def test_an_unknown_engine_option_is_an_error_with_a_hint():
    with pytest.raises(ConfigError, match="did you mean 'lookahead'"):
        LLM("demo", lookahed=1)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ConfigError, match="unknown engine option 'tensor_parallel_size'"):
        LLM("demo", tensor_parallel_size=2)  # pyright: ignore[reportCallIssue]


def test_every_field_of_the_config_is_a_keyword():
    assert set(EngineOptions.__annotations__) == {field.name for field in dataclasses.fields(EngineConfig)}
