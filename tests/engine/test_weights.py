"""A running engine gets new weights, sleeps and wakes: its answers are those of an engine that began with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gapless.bench.random_engine import RandomEngine, output_of
from gapless.config import EngineConfig
from gapless.device import has_cuda
from gapless.engine.core import InFlight
from gapless.errors import ConfigError, CorruptModelError
from gapless.weights.random import random_weights

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 512,
    "vocab_size": 997,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")]),
]
PROMPTS, NEW_TOKENS = [1, 5, 64, 90, 17, 33], [140, 9, 130, 12, 125, 118]
Start = Callable[[int], RandomEngine]


@pytest.fixture(params=DEVICES)
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """Starts engines on a device, with random weights from a seed."""
    shape, started = tmp_path / "config.json", list[RandomEngine]()
    shape.write_text(json.dumps(SHAPE))

    def make(seed: int) -> RandomEngine:
        config = EngineConfig(
            device=request.param,
            dtype="float32",
            max_rows=4,
            max_batch_tokens=64,
            num_blocks=100,
            max_model_len=300,
            seed=seed,
        )
        started.append(RandomEngine(str(shape), config))
        return started[-1]

    yield make
    for engine in started:
        engine.close()


def weights_of(engine: RandomEngine, seed: int) -> dict[str, Tensor]:
    return dict(random_weights(engine.model, torch.device("cpu"), torch.float32, seed))


def answers(engine: RandomEngine) -> int:
    return engine.generate(engine.requests(engine.random_prompts(PROMPTS), NEW_TOKENS)).checksum()


def loaded_with(engine: RandomEngine, seed: int) -> int:
    """The answers once it has these weights, by a way that is tested elsewhere."""
    engine.engine.update_weights(weights_of(engine, seed))
    return answers(engine)


def test_answers_after_an_update_are_those_of_the_new_weights(start: Start):
    engine = start(1)
    first = answers(engine)
    weights = weights_of(engine, 2)
    engine.engine.update_weights(weights)
    second = answers(engine)
    assert second != first
    fresh = start(3)
    assert loaded_with(fresh, 2) == second
    assert loaded_with(engine, 3) == loaded_with(fresh, 3) not in (first, second)


@pytest.mark.parametrize("in_flight", ["finish", "continue", "restart"])
def test_an_update_in_the_middle_of_the_work_ends_it_all(start: Start, in_flight: InFlight):
    engine = start(1)
    requests = engine.requests(engine.random_prompts(PROMPTS), NEW_TOKENS)
    weights = weights_of(engine, 2)
    engine.engine.submit(requests)
    left, lost = {request.request_id: count for request, count in zip(requests, NEW_TOKENS, strict=True)}, 0
    updated = False
    while left:
        record = output_of(engine.engine.next_output())
        for request_id in record.restarted:
            left[request_id] = NEW_TOKENS[requests.index(next(r for r in requests if r.request_id == request_id))]
            lost += 1
        for request_id in record.request_ids.tolist():
            left[request_id] -= 1
        for end in record.finished:
            assert left.pop(end.request_id) == 0
        if not updated:
            updated = True
            engine.engine.update_weights(weights, in_flight=in_flight)
    assert (lost > 0) == (in_flight == "restart")
    fresh = start(3)
    assert answers(engine) == loaded_with(fresh, 2)


def test_wrong_weights_are_refused_and_change_nothing(start: Start):
    engine = start(1)
    first = answers(engine)
    with pytest.raises(CorruptModelError, match="does not belong"):
        engine.engine.update_weights({**weights_of(engine, 2), "model.wrong": torch.zeros(1)})
    assert answers(engine) == first


def test_an_engine_wakes_as_it_fell_asleep(start: Start):
    engine = start(1)
    first = answers(engine)
    gpu = engine.on_gpu
    weights = sum(tensor.nbytes for tensor in weights_of(engine, 1).values())
    awake, asleep = list[int](), list[int]()
    for _ in range(3):
        awake.append(torch.cuda.memory_allocated() if gpu else 0)
        engine.engine.sleep()
        engine.engine.sleep()
        asleep.append(torch.cuda.memory_allocated() if gpu else 0)
        if gpu:
            with pytest.raises(ConfigError, match="wake"):
                engine.engine.resume()
            with pytest.raises(ConfigError, match="wake"):
                engine.engine.update_weights(weights_of(engine, 2))
        engine.engine.wake()
        engine.engine.wake()
        assert answers(engine) == first
    if gpu:
        assert all(before - after > weights for before, after in zip(awake, asleep, strict=True))
        assert (awake[2], asleep[2]) == (awake[1], asleep[1])  # the first time, cuBLAS takes a workspace for a thread


def test_requests_that_ran_when_it_fell_asleep_end_after_it_wakes(start: Start):
    engine = start(1)
    expected = engine.generate(engine.requests(engine.random_prompts(PROMPTS), NEW_TOKENS))
    requests = engine.requests(engine.random_prompts(PROMPTS), NEW_TOKENS)
    engine.engine.submit(requests)
    engine.engine.sleep()
    engine.engine.wake()
    tokens, left = dict[int, list[int]](), len(requests)
    while left:
        record = output_of(engine.engine.next_output())
        for request_id, token in zip(record.request_ids.tolist(), record.tokens.tolist(), strict=True):
            tokens.setdefault(request_id, []).append(token)
        left -= len(record.finished)
    assert [len(tokens[request.request_id]) for request in requests] == NEW_TOKENS
    assert sum(each.size for each in expected.tokens) == sum(NEW_TOKENS)
