"""What a request asks of its answer gives the same tokens at every lookahead: one test for each thing to ask.

Every run compares all answers, ends and log probabilities with the oracle's (tests/support/sim/oracle.py), which is
plain Python. Here with the real sampler; the schedules of tests/sim mix everything at random.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gapless.params import SamplingParams
from gapless.request import FinishReason
from gapless.sampling.torch_sampler import TorchSampler
from support.effort import effort
from support.sim.oracle import answer_of_the_real_sampler
from support.sim.parts import Parts
from support.sim.rig import Result, run
from support.sim.schedule import Move, Schedule

LOOKAHEADS = range(3)
BASE = Schedule(
    lookahead=0,
    rows=4,
    batch_tokens=9,
    block_size=2,
    blocks=40,
    max_length=40,
    graphs=False,
    order_seed=5,
    eagerness=None,
    reader_lag=0,
    moves=(),
)
PARTS = Parts(sampler=TorchSampler, expected=answer_of_the_real_sampler)
PLAIN = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
PROMPTS = ((7, 7, 9), (3, 1, 4, 1, 5, 9), (2,), (60, 0, 12, 7, 7))
FEW = tuple(range(20, 28))  # so that tokens come again

ASKED: dict[str, dict[str, Any]] = {
    "repetition penalty": {"params": {"repetition_penalty": 3.0}},
    "presence penalty": {"params": {"presence_penalty": 2.0, "allowed_token_ids": FEW}},
    "frequency penalty": {"params": {"frequency_penalty": 0.9, "allowed_token_ids": FEW}},
    "logit bias": {"params": {"logit_bias": {5: 4.0, 7: -100.0}}},
    "allowed tokens": {"params": {"allowed_token_ids": FEW}},
    "bad words": {"params": {"bad_words": [(47,), (20, 21), (22, 22), (23, 24, 25)], "allowed_token_ids": FEW}},
    "min tokens": {"params": {"min_tokens": 9, "stop_token_ids": tuple(range(0, 61, 2))}},
    "stop tokens": {"params": {"stop_token_ids": tuple(range(0, 61, 7))}},
    "stop sequences": {"params": {"allowed_token_ids": FEW}, "endings": ((20, 21), (22,), (25, 23, 20))},
    "a form": {"form": (77, -1, -1)},
    "a form that ends": {"form": (77, 5, -1), "params": {"ignore_eos": False}},
    "a form that fails": {"form": (77, -1, 5)},
    "logprobs": {"params": {"logprobs": 4}},
    "prompt logprobs": {"params": {"prompt_logprobs": 4}},
    "a logits processor": {"params": {"processor_args": {"tilt": 0.7}}},
    "n": {"params": {"n": 3, "temperature": 1.0}},
}
LEAVES_TOKENS = ("logprobs", "prompt logprobs")


def moves_of(asked: dict[str, Any], temperature: float) -> tuple[Move, ...]:
    """Four requests, every second one plain; two come while the others decode."""
    moves: list[Move] = []
    for number, prompt in enumerate(PROMPTS):
        params = dataclasses.replace(PLAIN, temperature=temperature, seed=number + 11)
        move = Move(14 * number, "add", prompt=prompt, params=params)
        if number % 2 == 0:
            params = dataclasses.replace(params, **asked.get("params", {}))
            move = dataclasses.replace(move, params=params, form=asked.get("form"), endings=asked.get("endings", ()))
        moves.append(move)
    return tuple(moves)


def run_at(lookahead: int, asked: dict[str, Any], temperature: float, *more: Move) -> Result:
    moves = sorted((*moves_of(asked, temperature), *more), key=lambda move: move.point)
    result = run(dataclasses.replace(BASE, lookahead=lookahead, moves=tuple(moves)), PARTS)
    assert result.violation is None, result.violation
    return result


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ASKED)
def test_tokens_are_the_same_at_every_lookahead(name: str, temperature: float):
    runs = [run_at(lookahead, ASKED[name], temperature) for lookahead in LOOKAHEADS]
    assert runs[0].tokens == runs[1].tokens == runs[2].tokens
    assert [each.finished for each in runs[1:]] == [runs[0].finished] * 2
    plain = run_at(0, {}, temperature)
    assert (runs[0].tokens == plain.tokens) == (name in LEAVES_TOKENS)


@pytest.mark.parametrize("lookahead", LOOKAHEADS[1:])
@pytest.mark.parametrize("name", ASKED)
def test_and_they_stay_the_same_when_everybody_is_preempted(name: str, lookahead: int):
    undisturbed, preemptions = run_at(lookahead, ASKED[name], 1.0), 0
    for point in (25, 85, 55)[: effort(2, 3)]:
        preempts = [Move(point + number, "preempt", number) for number in range(4)]
        result = run_at(lookahead, ASKED[name], 1.0, *preempts)
        assert result.tokens == undisturbed.tokens
        preemptions += result.preemptions
    assert preemptions > effort(1, 2)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_every_logprob_of_a_prompt_comes_once_whatever_is_cached_or_preempted(lookahead: int):
    """In order and right, as any run checks; here that none is missing where the prefix cache has all of the prompt."""
    prompt = tuple(range(1, 30))
    params = dataclasses.replace(PLAIN, prompt_logprobs=2)
    for point in range(0, 60, 13):
        moves = (
            Move(0, "add", prompt=prompt, params=PLAIN),
            Move(300, "add", prompt=prompt, params=params),
            Move(300 + point, "preempt", 1),
        )
        result = run(dataclasses.replace(BASE, lookahead=lookahead, moves=moves), PARTS)
        assert result.violation is None, result.violation
        assert result.prompt_lines == len(prompt) - 1


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_a_form_that_can_not_be_followed_ends_its_request_alone(lookahead: int):
    result = run_at(lookahead, ASKED["a form that fails"], 0.0)
    reasons = [result.finished[number].reason for number in range(4)]
    assert reasons == [FinishReason.ERROR, FinishReason.LENGTH] * 2
    assert [result.finished[number].generated for number in range(4)] == [5, 14, 5, 14]
