"""Penalties, bad words and log probabilities on a real model against transformers', in float32 on a CPU.

transformers' logits for a whole sequence come from one forward pass. A greedy answer is right if each of its tokens is
the likeliest once transformers' processor has changed the logits of its place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gapless import LLM, SamplingParams
from gapless.outputs import TokenLogprob
from support.oracle import Reference
from support.oracle_steps import Edit, Logits, answers, check_greedy

pytestmark = pytest.mark.slow
NEW_TOKENS = 20


def counted(presence: float, frequency: float, prompt_length: int) -> Edit:
    def edit(ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(ids[0, prompt_length:], minlength=scores.shape[1])
        return scores - counts * frequency - (counts > 0) * presence

    return edit


def test_penalties_are_those_of_transformers(chat_llm: LLM, chats: list[list[int]], logits: Logits):
    from transformers import RepetitionPenaltyLogitsProcessor

    repeated: Any = RepetitionPenaltyLogitsProcessor(penalty=1.3)
    params = [
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, repetition_penalty=1.3),
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, repetition_penalty=1.3),
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, presence_penalty=1.5, frequency_penalty=0.25),
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, frequency_penalty=1.0),
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, presence_penalty=-0.5),
    ]
    edits = [
        repeated,
        repeated,
        counted(1.5, 0.25, len(chats[2])),
        counted(0.0, 1.0, len(chats[3])),
        counted(-0.5, 0.0, len(chats[4])),
    ]
    outputs = answers(chat_llm, chats, params)
    assert check_greedy(outputs, logits, edits) > 5


def test_a_greedy_answer_with_a_penalty_is_what_transformers_generates(
    chat_llm: LLM, chats: list[list[int]], reference: Reference
):
    [output] = answers(chat_llm, chats[:1], SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.3))
    with torch.inference_mode():
        out = reference.model.generate(
            torch.tensor([chats[0]]), max_new_tokens=12, do_sample=False, repetition_penalty=1.3, pad_token_id=0
        )
    assert output.outputs[0].token_ids == out[0, len(chats[0]) :].tolist()


def test_bad_words_are_those_of_transformers(chat_llm: LLM, chats: list[list[int]], logits: Logits):
    from transformers import NoBadWordsLogitsProcessor

    plain = chat_llm.generate(chats, SamplingParams(temperature=0, max_tokens=NEW_TOKENS), use_tqdm=False)
    words = [word for output in plain for word in output.outputs[0].text.split()[1:12:3]]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, bad_words=words)
    outputs = answers(chat_llm, chats, params)
    sequences = chat_llm.loaded.encoder.bad_words(params, ())
    assert any(len(ids) > 1 for ids in sequences)
    processor: Any = NoBadWordsLogitsProcessor([list(ids) for ids in sequences], eos_token_id=2)
    assert check_greedy(outputs, logits, [processor] * len(chats)) > 5
    for output in outputs:
        assert not set(words) & {*output.outputs[0].text.split(" ")}


def check_logprob(found: TokenLogprob | None, logits_V: Tensor, token: int, count: int) -> None:
    wanted_V = torch.log_softmax(logits_V.double(), 0)
    assert found is not None
    assert found.token_id == token
    assert abs(found.logprob - float(wanted_V[token])) < 1e-4
    above, near = ((wanted_V > wanted_V[token] + slack).sum() for slack in (1e-4, -1e-4))
    assert int(above) < found.rank <= int(near)
    values, _ = wanted_V.topk(count)
    assert len(found.top) == count
    for (each, logprob), value in zip(found.top, values.tolist(), strict=True):
        assert abs(logprob - value) < 1e-4
        assert abs(float(wanted_V[each]) - value) < 1e-4


def test_log_probabilities_are_those_of_transformers(chat_llm: LLM, chats: list[list[int]], logits: Logits):
    params = [
        SamplingParams(
            temperature=place / 2,
            seed=place,
            max_tokens=8,
            logprobs=place * 5,
            prompt_logprobs=20 - place * 5,
            repetition_penalty=1.0 + place / 10,  # which log probabilities do not show
        )
        for place in range(5)
    ]
    for place, output in enumerate(answers(chat_llm, chats, params)):
        [got] = output.outputs
        prompt = output.prompt_token_ids
        all_TV = logits((*prompt, *got.token_ids))
        assert got.logprobs is not None
        assert output.prompt_logprobs is not None
        assert len(got.logprobs) == len(got.token_ids)
        assert len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        for at, token in enumerate(prompt[1:], start=1):
            check_logprob(output.prompt_logprobs[at], all_TV[at - 1], token, 20 - place * 5)
        for at, token in enumerate(got.token_ids):
            check_logprob(got.logprobs[at], all_TV[len(prompt) + at - 1], token, place * 5)
