"""Log probabilities, echo and what a stream has of them, against the hashing model's scores."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from frontend.tiny import SMALL, tiny_engine, tiny_tokenizer
from gapless import LLM, AsyncLLM, SamplingParams
from gapless.device.cpu import CpuDevice
from gapless.engine.build import build_engine
from gapless.errors import InvalidRequestError
from gapless.loading import LoadedEngine
from gapless.outputs import TokenLogprob
from gapless.prompts import Prompt
from gapless.sampling.torch_sampler import TorchSampler
from support.hash_model import VOCAB, HashModel, prefix_hash, scores

PROMPTS = [[1, 2, 3], [7], list(range(1, 60)), [9] * 20]


def wanted(prefix: Sequence[int], token: int, count: int) -> TokenLogprob:
    """Of a token behind a prefix, computed without an engine."""
    logits = scores(torch.tensor([prefix_hash(prefix)]))[0].float() / 1000.0
    logprobs = torch.log_softmax(logits.double(), 0).tolist()
    order = sorted(range(VOCAB), key=lambda each: (-logits[each], each))
    top = tuple((each, logprobs[each]) for each in order[:count])
    return TokenLogprob(token, logprobs[token], 1 + order.index(token), top)


def check(found: TokenLogprob | None, expected: TokenLogprob) -> None:
    assert found is not None
    assert (found.token_id, found.rank) == (expected.token_id, expected.rank)
    assert [token for token, _ in found.top] == [token for token, _ in expected.top]
    got = [found.logprob, *(logprob for _, logprob in found.top)]
    assert np.allclose(got, [expected.logprob, *(logprob for _, logprob in expected.top)], atol=1e-4)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 16}, {"num_blocks": 50}])
def test_every_token_has_the_log_probability_that_the_model_gives_it(lookahead: int, options: dict[str, Any]):
    params = [
        SamplingParams(max_tokens=30, seed=place, logprobs=place * 4, prompt_logprobs=3 - place, temperature=1.5)
        for place in range(len(PROMPTS))
    ]
    plain = SamplingParams(max_tokens=30, seed=9)
    with LLM.from_loaded(tiny_engine(lookahead=lookahead, **options)) as llm:
        llm.generate(PROMPTS, plain, use_tqdm=False)  # so that a cache could hide prompts' tokens
        outputs = llm.generate([*PROMPTS, [4, 5]], [*params, plain], use_tqdm=False)
    for place, (prompt, output) in enumerate(zip(PROMPTS, outputs[:-1], strict=True)):
        [got] = output.outputs
        assert got.logprobs is not None
        assert len(got.logprobs) == len(got.token_ids)
        for at, token in enumerate(got.token_ids):
            check(got.logprobs[at], wanted([*prompt, *got.token_ids[:at]], token, place * 4))
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        for at in range(1, len(prompt)):
            check(output.prompt_logprobs[at], wanted(prompt[:at], prompt[at], 3 - place))
    assert outputs[-1].outputs[0].logprobs is None
    assert outputs[-1].prompt_logprobs is None


def test_streams_bring_each_log_probability_once():
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=2, prompt_logprobs=1, n=2)

    async def scenario() -> None:
        async with AsyncLLM.from_loaded(tiny_engine()) as llm:
            [final] = [each async for each in llm.generate(PROMPTS[0], params, output_kind="final")]
            deltas = [each async for each in llm.generate(PROMPTS[0], params, output_kind="delta")]
            assert [each.prompt_logprobs for each in deltas] == [final.prompt_logprobs, *[None] * (len(deltas) - 1)]
            for continuation in final.outputs:
                pieces = [each for output in deltas for each in output.outputs if each.index == continuation.index]
                assert [found for each in pieces for found in each.logprobs or ()] == continuation.logprobs

    asyncio.run(scenario())
    with LLM.from_loaded(tiny_engine()) as llm:
        [whole] = llm.generate(PROMPTS[0], params, use_tqdm=False)
        found: list[list[TokenLogprob]] = [[], []]
        deltas = list(llm.stream(PROMPTS[0], params))
        assert [each.prompt_logprobs for each in deltas] == [whole.prompt_logprobs, *[None] * (len(deltas) - 1)]
        for delta in deltas:
            assert delta.logprobs is not None
            assert [each.token_id for each in delta.logprobs] == delta.token_ids
            found[delta.continuation] += delta.logprobs
        assert found == [each.logprobs for each in whole.outputs]


@pytest.mark.parametrize("stop", [(), "c"])
def test_echo_puts_the_prompt_before_the_answer_and_stop_strings_do_not_look_into_it(stop: str | tuple[str, ...]):
    words = tiny_tokenizer()
    plain = SamplingParams(temperature=0, max_tokens=20, stop=stop)
    echo = SamplingParams(temperature=0, max_tokens=20, stop=stop, echo=True)
    with LLM.from_loaded(tiny_engine()) as llm:
        ids = words.encode("abcabc")
        prompts: list[Prompt] = ["abcabc", ids, {"messages": [{"role": "user", "content": "abcabc"}]}]
        for prompt in prompts:
            [without], [with_it] = (llm.generate(prompt, each, use_tqdm=False) for each in (plain, echo))
            said = with_it.prompt or "abcabc"
            assert with_it.outputs[0].text == said + without.outputs[0].text
            assert with_it.outputs[0].token_ids == without.outputs[0].token_ids
            deltas = list(llm.stream(prompt, echo))
            assert deltas[0].text.startswith(said)
            assert "".join(each.text for each in deltas) == with_it.outputs[0].text
            assert [token for each in deltas for token in each.token_ids] == without.outputs[0].token_ids


def test_what_needs_a_tokenizer_is_refused_without_one():
    engine = build_engine(HashModel(), SMALL, CpuDevice(), TorchSampler(), torch.float32)
    loaded = LoadedEngine(engine, None, None, "tiny", "cpu", SMALL)
    with LLM.from_loaded(loaded) as llm:
        for params in (
            SamplingParams(echo=True),
            SamplingParams(bad_words=["a"]),
            SamplingParams(regex="a"),
            SamplingParams(json_object=True),
        ):
            with pytest.raises(InvalidRequestError, match="without a tokenizer"):
                llm.generate([1], params, use_tqdm=False)
        [output] = llm.generate([1], SamplingParams(bad_words=[[5]], max_tokens=3, logprobs=1), use_tqdm=False)
        assert output.outputs[0].logprobs
        assert llm.stats().scheduler.generated_tokens == 3


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [-1, 21, 1.5, True, "1"])
def test_numbers_of_log_probabilities_out_of_bounds_are_refused(name: str, value: object):
    with pytest.raises(InvalidRequestError, match=name):
        SamplingParams(**{name: value})  # pyright: ignore[reportArgumentType]
