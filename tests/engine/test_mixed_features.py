"""Every feature of a request, mixed in one batch: the same tokens at any lookahead, and on a GPU those of the CPU."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapless.config import EngineConfig
from gapless.device import has_cuda, open_device
from gapless.engine.build import build_engine
from gapless.engine.core import EngineFailure
from gapless.logits_processor import ProcessedStep
from gapless.outcome import LogprobLines
from gapless.params import SamplingParams
from gapless.request import TokenMasks
from gapless.sampling import make_sampler
from support.hash_model import VOCAB, HashModel

PROMPTS = 24


class Wandering:
    """A form for tests: which third of the vocabulary may come next depends on all tokens of the answer."""

    def start(self) -> TokenMasks:
        return WanderingMasks()


@dataclass(eq=False)
class WanderingMasks:
    state: int = 1
    error: str | None = None

    def accept(self, token_id: int) -> None:
        self.state = (self.state * 31 + token_id + 7) % 1009

    def fill(self, mask_W: NDArray[np.int32]) -> None:
        bits = np.zeros(32 * mask_W.size, dtype=np.uint8)
        bits[[token for token in range(VOCAB) if (token * 17 + self.state) % 3 == 0]] = 1
        mask_W[:] = np.packbits(bits, bitorder="little").view(np.int32)


class Tilt:
    name = "tilt"

    def __call__(self, logits_EV: Tensor, step: ProcessedStep) -> Tensor:
        ramp_V = torch.arange(logits_EV.shape[1], device=logits_EV.device)
        return logits_EV - (step.last_tokens_E[:, None] + ramp_V) % 7 * step.arguments_E[:, None]


@dataclass
class Answers:
    """By request, in the order in which they were made."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict[int, list[int]](list))
    logprobs: dict[int, list[LogprobLines]] = field(default_factory=lambda: defaultdict[int, list[LogprobLines]](list))
    prompts: dict[int, list[LogprobLines]] = field(default_factory=lambda: defaultdict[int, list[LogprobLines]](list))


def all_params() -> list[SamplingParams]:
    """Each feature alone and some together, greedy and not, with rows that ask for nothing between them."""
    features: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.7, "presence_penalty": 0.4, "frequency_penalty": 0.3},
        {"logit_bias": {3: 4.0, 11: -7.0, 60: 2.5}},
        {"allowed_token_ids": tuple(range(1, VOCAB, 4))},
        {"bad_words": [(5,), (7, 9), (12, 13, 14)], "frequency_penalty": -0.5},
        {"min_tokens": 20, "ignore_eos": False},
        {"logprobs": 4},
        {"prompt_logprobs": 3, "logprobs": 0},
        {"allowed_tokens": len},  # stands for a form
        {"processor_args": {"tilt": 0.7}},
        {"processor_args": {"tilt": 0.7}, "allowed_tokens": len, "presence_penalty": 1.0},
        {"n": 3, "repetition_penalty": 1.3},
    ]
    found: list[SamplingParams] = []
    for number in range(PROMPTS):
        given: dict[str, Any] = {"ignore_eos": True, "max_tokens": 20 + number % 5 * 3, "temperature": 0}
        if number % 2:
            given.update(temperature=1.3, seed=number, top_p=0.9)
        found.append(SamplingParams(**{**given, **features[number % len(features)]}))
    return found


def run(device_name: str, lookahead: int, *, graphs: bool) -> Answers:
    config = EngineConfig(
        lookahead=lookahead,
        max_rows=10,
        max_batch_tokens=64,
        block_size=8,
        num_blocks=70,
        max_model_len=120,
        graphs=graphs,
        graph_tokens=64,
    )
    device = open_device(device_name)
    model, sampler = HashModel(device=device.torch_device), make_sampler(device.torch_device)
    engine = build_engine(model, config, device, sampler, torch.float32, processors=[Tilt()])
    answers, left = Answers(), 0
    try:
        for number, params in enumerate(all_params()):
            prompt = [(number // 6 * 5 + at * 3) % VOCAB for at in range(5 + number * 7 % 45)]
            bad_words = [word for word in params.bad_words if not isinstance(word, str)]
            form = Wandering() if params.has_form else None
            first = engine.admission.make_request(prompt, params, bad_words=bad_words, form=form)
            requests = [first, *engine.admission.make_continuations(first)]
            engine.submit(requests)
            left += len(requests)
        while left:
            record = engine.next_output()
            assert record is not None
            if isinstance(record, EngineFailure):
                raise record.error
            owners, tokens = record.request_ids.tolist(), record.tokens.tolist()
            for line, (owner, token) in enumerate(zip(owners, tokens, strict=True)):
                answers.tokens[owner].append(token)
                if record.logprobs is not None:
                    answers.logprobs[owner].append(record.logprobs.at(slice(line, line + 1)))
            for piece in record.prompts:
                answers.prompts[piece.request_id].append(piece.lines)
            left -= len(record.finished)
    finally:
        engine.close()
    return answers


def assert_close(mine: list[LogprobLines], others: list[LogprobLines]) -> None:
    ids, wanted_ids = (np.concatenate([each.ids_LK for each in side]) for side in (mine, others))
    ranks, wanted_ranks = (np.concatenate([each.ranks_L for each in side]) for side in (mine, others))
    values, wanted_values = (np.concatenate([each.logprobs_LK for each in side]) for side in (mine, others))
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_array_equal(ranks, wanted_ranks)
    np.testing.assert_allclose(values, wanted_values, atol=1e-4)


@pytest.fixture(scope="module")
def on_cpu() -> Answers:
    return run("cpu", 0, graphs=False)


@pytest.mark.parametrize("lookahead", [1, 2])
def test_features_give_the_same_at_any_lookahead(lookahead: int, on_cpu: Answers):
    check(run("cpu", lookahead, graphs=False), on_cpu)


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_features_give_the_same_on_real_streams_and_in_captured_steps(lookahead: int, graphs: bool, on_cpu: Answers):
    check(run("cuda", lookahead, graphs=graphs), on_cpu)


def check(answers: Answers, on_cpu: Answers) -> None:
    assert answers.tokens == on_cpu.tokens
    assert sum(map(len, answers.tokens.values())) > 600
    asked = [owner for owner, lines in on_cpu.logprobs.items() if lines[0].ids_LK[0, 0] >= 0]
    assert asked
    for owner in asked:
        assert_close(answers.logprobs[owner], on_cpu.logprobs[owner])
    assert len(on_cpu.prompts) == 2
    for owner, lines in on_cpu.prompts.items():
        assert_close(answers.prompts[owner], lines)
