"""Bad parameters are refused when they are made, with a text that says what to change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gapless.config import EngineConfig, SchedulerLimits
from gapless.engine.admission import Admission, ModelFacts
from gapless.errors import (
    ConfigError,
    EmptyPromptError,
    InvalidRequestError,
    PromptTooLongError,
    RequestTooLargeError,
)
from gapless.params import MAX_STOP_TOKEN_IDS, SamplingParams

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": NAN},
        {"temperature": INF},
        {"temperature": "hot"},
        {"temperature": True},
        {"temperature": None},
        {"top_p": 0},
        {"top_p": 1.01},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 0.0099},
        {"top_p": NAN},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"top_k": -1},
        {"top_k": 1.5},
        {"seed": -1},
        {"seed": 2**64},
        {"max_tokens": 0},
        {"max_tokens": "many"},
        {"max_tokens": True},
        {"stop_token_ids": (-1,)},
        {"stop_token_ids": ("a",)},
        {"stop_token_ids": "12"},
        {"stop_token_ids": 5},
        {"stop_token_ids": tuple(range(MAX_STOP_TOKEN_IDS + 1))},
        {"ignore_eos": "no"},
    ],
    ids=str,
)
def test_a_parameter_out_of_range_is_refused_by_name(bad: dict[str, Any]):
    with pytest.raises(InvalidRequestError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_numbers_of_numpy_are_taken_as_plain_ones():
    values: dict[str, Any] = {"temperature": np.float32(0.5), "top_k": np.int64(3), "max_tokens": np.int32(2**31 - 1)}
    params = SamplingParams(**values)
    assert (type(params.temperature), type(params.top_k), type(params.max_tokens)) == (float, int, int)
    assert admission(num_blocks=100).make_request([1, 2], params).max_length == 32


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)  # pyright: ignore[reportCallIssue]


def admission(max_model_len: int = 32, num_blocks: int = 5) -> Admission:
    limits = SchedulerLimits(
        max_rows=2, max_batch_tokens=8, max_model_len=max_model_len, block_size=4, num_blocks=num_blocks
    )
    return Admission(limits, ModelFacts(vocab_size=100, eos_token_ids=(0, 3)), seed=1)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ([], EmptyPromptError),
        ([[1, 2]], InvalidRequestError),
        ([1.5], InvalidRequestError),
        (["a"], InvalidRequestError),
        ([100], InvalidRequestError),
        ([-1], InvalidRequestError),
        ([2**70], InvalidRequestError),
        ([1] * 32, PromptTooLongError),
        ([1] * 31, RequestTooLargeError),  # 31 positions need 8 blocks of 4; there are 4
        ([1, [2]], InvalidRequestError),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_prompt_that_can_not_run_is_refused_with_a_typed_error(prompt: Any, error: type[Exception]):
    with pytest.raises(error):
        admission().make_request(prompt, SamplingParams())


def test_a_request_that_just_fits_is_accepted():
    request = admission().make_request([1] * 7, SamplingParams(max_tokens=10))
    assert request.max_length == 17  # feeds 16 positions: 4 blocks of 4
    with pytest.raises(RequestTooLargeError, match="5 KV blocks"):
        admission().make_request([1] * 7, SamplingParams(max_tokens=11))


def test_max_tokens_ends_at_the_context_limit():
    request = admission(num_blocks=100).make_request([1] * 30, SamplingParams(max_tokens=50))
    assert request.max_length == 32


def test_ignore_eos_keeps_the_stop_tokens_of_the_request():
    make = admission(num_blocks=100).make_request
    assert make([1], SamplingParams(stop_token_ids=(7,))).stop_ids.tolist() == [0, 3, 7]
    assert make([1], SamplingParams(stop_token_ids=(7,), ignore_eos=True)).stop_ids.tolist() == [7]
    with pytest.raises(InvalidRequestError, match="stop_token_ids: token id 100"):
        make([1], SamplingParams(stop_token_ids=(100,)))


def test_requests_without_a_seed_get_different_ones_that_depend_on_the_engine_seed_alone():
    first, again = admission(), admission()
    seeds = [first.make_request([1], SamplingParams(max_tokens=1)).seed for _ in range(50)]
    assert len(set(seeds)) == 50
    assert seeds == [again.make_request([1], SamplingParams(max_tokens=1)).seed for _ in range(50)]


def test_a_prompt_array_is_copied():
    prompt = np.asarray([1, 2, 3], dtype=np.int32)
    request = admission().make_request(prompt, SamplingParams(max_tokens=1))
    prompt[0] = 99
    assert request.prompt.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "bad",
    [
        {"lookahead": -1},
        {"lookahead": 17},
        {"lookahead": True},
        {"max_rows": 0},
        {"max_rows": 512, "max_batch_tokens": 511},
        {"block_size": 24},
        {"memory_fraction": 0.0},
        {"memory_fraction": 1.5},
        {"dtype": "int8"},
        {"num_blocks": 0},
        {"graph_buckets": (0,)},
        {"graph_buckets": (512,)},
        {"max_model_len": 1},
    ],
    ids=str,
)
def test_an_engine_option_out_of_range_is_refused_by_name(bad: dict[str, Any]):
    with pytest.raises(ConfigError, match=list(bad)[-1]):
        EngineConfig(**bad)
