"""Stop strings from the prompt to the text, on a model whose answers are known."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from frontend.tiny import SMALL, answer, tiny_engine, tiny_tokenizer
from gapless import LLM, SamplingParams
from gapless.device.cpu import CpuDevice
from gapless.engine.build import build_engine
from gapless.errors import InvalidRequestError
from gapless.loading import LoadedEngine
from gapless.sampling.torch_sampler import TorchSampler
from support.hash_model import EOS, HashModel, prefix_hash, scores

WORDS = tiny_tokenizer()
PROMPTS = [[1, 2, 3], [7], [9, 9, 9, 9], [30, 4], [22, 21, 20]]


def answer_of_least(prompt: Sequence[int], least: int) -> list[int]:
    """What the model says if it may not end before it has so many tokens."""
    tokens = list(prompt)
    while len(tokens) < min(128, len(prompt) + 60) and (tokens[-1] != EOS or len(tokens) == len(prompt)):
        found = scores(torch.tensor([prefix_hash(tokens)]))[0]
        if len(tokens) - len(prompt) < least:
            found[EOS] = -1
        tokens.append(int(found.argmax()))
    return tokens[len(prompt) :]


def wanted(
    prompt: Sequence[int], stop: Sequence[str], include: bool, least: int = 0
) -> tuple[str, list[int], str | int | None]:
    """The text, the tokens and the stop reason, by decoding the whole answer again and again."""
    tokens, before = answer_of_least(prompt, least), ""
    for count in range(1, len(tokens) + 1):
        text = WORDS.decode(tokens[:count])
        known = next((at for at in range(len(before)) if not text.startswith(before[: at + 1])), len(before))
        found = [
            (at, place)
            for place, each in enumerate(stop)
            for at in range(len(text))
            if text.startswith(each, at) and at + len(each) > known
        ]
        before = text
        if found and count >= least:
            begin, place = min(found)
            return text[: begin + len(stop[place]) * include], tokens[:count], stop[place]
    return WORDS.decode(tokens), tokens, None


def some_stops(rng: random.Random, prompt: Sequence[int]) -> tuple[str, ...]:
    """Pieces of the answer, of others and of nothing."""
    text = WORDS.decode(answer(prompt, 60))
    begin = rng.randrange(len(text))
    piece = text[begin : begin + rng.randrange(1, 5)]
    return tuple(rng.sample([piece, "zq", "\ufffd", "a", text[-2:], "€"], rng.randrange(1, 4)))


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_text_tokens_and_reason_are_those_of_the_answer_cut_at_its_first_stop_string(lookahead: int):
    rng = random.Random(lookahead)
    with LLM.from_loaded(tiny_engine(lookahead=lookahead)) as llm:
        for _ in range(12):
            include, least = rng.random() < 0.5, rng.choice([0, 0, 4, 12])
            stops = [some_stops(rng, prompt) for prompt in PROMPTS]
            params = [
                SamplingParams(
                    temperature=0, max_tokens=60, min_tokens=least, stop=each, include_stop_str_in_output=include
                )
                for each in stops
            ]
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            streamed = dict.fromkeys(range(len(PROMPTS)), "")
            for delta in llm.stream(PROMPTS, params):
                streamed[delta.index] += delta.text
                assert outputs[delta.index].outputs[0].text.startswith(streamed[delta.index])
            for place, (prompt, stop, output) in enumerate(zip(PROMPTS, stops, outputs, strict=True)):
                text, tokens, reason = wanted(prompt, stop, include, least)
                got = output.outputs[0]
                assert (got.text, got.token_ids, got.stop_reason) == (text, tokens, reason)
                assert streamed[place] == text
                if reason is not None:
                    assert got.finish_reason == "stop"


@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_preempted_request_still_finds_a_stop_string_that_began_before(lookahead: int):
    loaded = tiny_engine(lookahead=lookahead, num_blocks=24, max_rows=8)  # not enough for all at once
    text = {tuple(prompt): WORDS.decode(answer(prompt, 60)) for prompt in PROMPTS}
    params = [SamplingParams(temperature=0, max_tokens=60, stop=text[tuple(prompt)][-3:]) for prompt in PROMPTS]
    with LLM.from_loaded(loaded) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert llm.stats().scheduler.preemptions
    for prompt, each, output in zip(PROMPTS, params, outputs, strict=True):
        assert (output.outputs[0].text, output.outputs[0].token_ids) == wanted(prompt, each.stop, False)[:2]


def test_a_token_that_is_asked_to_stop_at_is_the_stop_reason_and_the_end_of_sequence_is_none():
    with LLM.from_loaded(tiny_engine()) as llm:
        tokens = answer([7], 30, ignore_eos=True)
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop_token_ids=(tokens[3],))
        [output] = llm.generate([7], params, use_tqdm=False)
        assert output.outputs[0].stop_reason == tokens[3]
        [ended] = llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=100), use_tqdm=False)
        assert ended.outputs[0].stop_reason is None


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ("", "1 to 256 characters"),
        (["a"] * 17, "at most 16"),
        ([3], "1 to 256 characters"),
        (["x" * 257], "1 to 256 characters"),
        (7, "a list of strings"),
    ],
)
def test_stop_strings_out_of_bounds_are_refused(stop: object, said: str):
    with pytest.raises(InvalidRequestError, match=said):
        SamplingParams(stop=stop)  # pyright: ignore[reportArgumentType]


def test_without_a_tokenizer_there_is_no_text_to_stop_at():
    engine = build_engine(HashModel(), SMALL, CpuDevice(), TorchSampler(), torch.float32)
    loaded = LoadedEngine(engine, None, None, "tiny", "cpu", SMALL)
    with LLM.from_loaded(loaded) as llm, pytest.raises(InvalidRequestError, match="without a tokenizer"):
        llm.generate([1], SamplingParams(stop="a"), use_tqdm=False)
