"""n answers to one prompt: together in one output, apart in a stream, and ended together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from frontend.tiny import answer, num_held_blocks, tiny_engine, tiny_tokenizer
from gapless import LLM, AsyncLLM, RequestOutput, SamplingParams
from gapless.collector import Prepared
from gapless.errors import InvalidRequestError
from gapless.progress import Progress

PROMPTS = [[1 + i, 2, 3 + i] for i in range(6)]
SEEDED = SamplingParams(n=3, seed=7, max_tokens=24)
GREEDY = SamplingParams(n=3, temperature=0, max_tokens=24)


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[list[int]]]:
    return [[each.token_ids for each in output.outputs] for output in outputs]


def run(lookahead: int, params: SamplingParams, **options: Any) -> list[RequestOutput]:
    with LLM.from_loaded(tiny_engine(lookahead=lookahead, **options)) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert num_held_blocks(llm.loaded) == 0
    return outputs


@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}, {"max_rows": 2}, {"num_blocks": 33}])
def test_every_prompt_has_n_answers_that_are_the_same_at_every_lookahead(options: dict[str, Any]):
    outputs = [run(lookahead, SEEDED, **options) for lookahead in (0, 1, 2)]
    assert tokens_of(outputs[0]) == tokens_of(outputs[1]) == tokens_of(outputs[2]) == tokens_of(run(0, SEEDED))
    words = tiny_tokenizer()
    for output in outputs[0]:
        assert output.finished
        assert [each.index for each in output.outputs] == [0, 1, 2]
        assert len({tuple(each.token_ids) for each in output.outputs}) == 3
        assert [each.text for each in output.outputs] == [words.decode(each.token_ids) for each in output.outputs]
        assert output.usage.completion_tokens == sum(len(each.token_ids) for each in output.outputs)
        assert output.usage.prompt_tokens == 3


def test_greedy_answers_to_one_prompt_are_those_that_it_gets_alone():
    for prompt, output in zip(PROMPTS, run(1, GREEDY), strict=True):
        assert [each.token_ids for each in output.outputs] == [answer(prompt, 24)] * 3


@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_stream_has_the_deltas_of_each_answer(lookahead: int):
    with LLM.from_loaded(tiny_engine(lookahead=lookahead)) as llm:
        whole = llm.generate(PROMPTS, SEEDED, use_tqdm=False)
        texts: dict[tuple[int, int], str] = {}
        tokens: dict[tuple[int, int], list[int]] = {}
        ended: dict[tuple[int, int], str] = {}
        for delta in llm.stream(PROMPTS, SEEDED):
            key = delta.index, delta.continuation
            assert key not in ended
            texts[key] = texts.get(key, "") + delta.text
            tokens.setdefault(key, []).extend(delta.token_ids)
            if delta.finish_reason is not None:
                ended[key] = delta.finish_reason
    for place, output in enumerate(whole):
        for each in output.outputs:
            key = place, each.index
            assert (texts[key], tokens[key], ended[key]) == (each.text, each.token_ids, each.finish_reason)
    assert len(ended) == 3 * len(PROMPTS)


def test_a_window_counts_prompts_and_not_their_answers():
    with LLM.from_loaded(tiny_engine()) as llm:
        drawn = finished = 0

        def source() -> Iterator[Prepared]:
            nonlocal drawn
            for prompt in PROMPTS:
                drawn += 1
                yield llm.prepare(prompt, GREEDY)

        for _ in llm.run(source(), window=2):
            finished += 1
            assert drawn <= finished + 2 + 1
    assert finished == len(PROMPTS)


class Watched(Progress):
    """Keeps what it was told."""

    def __init__(self) -> None:
        super().__init__(None, False)
        self.told: list[tuple[int, int]] = []

    def advance(self, *, tokens: int, running: int, finished: int) -> None:
        self.told.append((running, finished))


def test_progress_counts_prompts():
    progress = Watched()
    endless = SamplingParams(n=2, max_tokens=9, ignore_eos=True)
    with LLM.from_loaded(tiny_engine(max_rows=12)) as llm:
        list(llm.run([llm.prepare(prompt, endless) for prompt in PROMPTS], progress=progress))
    assert max(running for running, _ in progress.told) == len(PROMPTS)
    assert sum(finished for _, finished in progress.told) == len(PROMPTS)
    assert progress.told[-1][0] == 0


def early_end() -> SamplingParams:
    """The first answer ends long before another does."""
    with LLM.from_loaded(tiny_engine()) as llm:
        for seed in range(100):
            params = SamplingParams(n=3, seed=seed, max_tokens=90)
            first, *others = tokens_of(llm.generate(PROMPTS[0], params, use_tqdm=False))[0]
            if len(first) + 60 < max(map(len, others)):
                return params
    raise AssertionError("all answers are about as long")


@pytest.mark.parametrize("kind", ["cumulative", "delta"])
def test_outputs_go_on_when_the_first_answer_has_ended(kind: str):
    params = early_end()

    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine()) as llm:
            outputs = [
                output
                async for output in llm.generate(PROMPTS[0], params, output_kind=kind)  # pyright: ignore[reportArgumentType]
            ]
            ended = [
                place
                for place, output in enumerate(outputs)
                if any(not each.index and each.finish_reason for each in output.outputs)
            ]
            assert len(outputs) > ended[0] + 3
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]

    asyncio.run(scenario())


def test_leaving_a_stream_ends_all_answers():
    endless = SamplingParams(n=4, max_tokens=100, ignore_eos=True)
    with LLM.from_loaded(tiny_engine()) as llm:
        for _ in llm.stream(PROMPTS[0], endless):
            break
        llm.generate([5], SamplingParams(max_tokens=1), use_tqdm=False)
        assert num_held_blocks(llm.loaded) == 0
        assert llm.stats().scheduler.generated_tokens < 100


def test_prepared_knows_the_ids_of_all_answers_and_the_first_names_the_prompt():
    with LLM.from_loaded(tiny_engine()) as llm:
        prepared: Prepared = llm.prepare([1, 2], GREEDY)
        first = prepared.requests[0].request_id
        assert prepared.request_id == first
        assert [each.leader for each in prepared.requests] == [-1, first, first]
        [output] = llm.run([prepared])
        assert output.request_id == str(first)


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final"])
def test_an_asynchronous_iterator_carries_all_answers(kind: str):
    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine(lookahead=1)) as llm:
            found: list[tuple[list[int], list[str]]] = [([], []) for _ in range(3)]
            outputs = [
                output
                async for output in llm.generate(PROMPTS[0], SEEDED, output_kind=kind)  # pyright: ignore[reportArgumentType]
            ]
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
            assert llm.num_open == 0
            if kind == "delta":
                for output in outputs:
                    assert output.outputs
                    for each in output.outputs:
                        assert each.token_ids or each.finish_reason
                        found[each.index][0].extend(each.token_ids)
                        found[each.index][1].append(each.text)
            else:
                assert all([each.index for each in output.outputs] == [0, 1, 2] for output in outputs)
                found = [(each.token_ids, [each.text]) for each in outputs[-1].outputs]
            assert len(outputs) == 1 if kind == "final" else len(outputs) > 3
            [wanted] = tokens_of(run(0, SEEDED)[:1])
            assert [tokens for tokens, _ in found] == wanted
            assert ["".join(texts) for _, texts in found] == [tiny_tokenizer().decode(tokens) for tokens in wanted]

    asyncio.run(scenario())


def test_cancelling_an_iterator_ends_all_answers():
    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine()) as llm:
            stream = llm.generate(PROMPTS[0], SamplingParams(n=4, max_tokens=100, ignore_eos=True))
            await anext(stream)
            assert llm.num_open == 1
            stream.cancel()
            assert llm.num_open == 0
            [_] = [each async for each in llm.generate([5], SamplingParams(max_tokens=1), output_kind="final")]
            assert num_held_blocks(llm.loaded) == 0
            assert llm.stats().scheduler.generated_tokens < 100

    asyncio.run(scenario())


@pytest.mark.parametrize("n", [0, 129, 1.5, "2", True, None])
def test_n_out_of_bounds_is_refused(n: object):
    with pytest.raises(InvalidRequestError, match="n must be"):
        SamplingParams(n=n)  # pyright: ignore[reportArgumentType]
