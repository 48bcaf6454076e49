"""Logits processors: for the rows that have an argument, and for no other, whatever else is in the step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gapless.config import EngineConfig
from gapless.device.cpu import CpuDevice
from gapless.engine.build import build_engine
from gapless.engine.core import Engine, EngineFailure
from gapless.errors import ConfigError, EngineDeadError, InvalidRequestError
from gapless.logits_processor import LogitsProcessor, ProcessedStep
from gapless.params import SamplingParams
from gapless.sampling import make_sampler
from support.hash_model import VOCAB, HashModel, expected_tokens, next_token

CONFIG = EngineConfig(lookahead=2, max_rows=5, max_batch_tokens=24, block_size=4, num_blocks=64, max_model_len=64)


class Only:
    """Nothing but the token that is the argument."""

    name = "only"

    def __call__(self, logits_EV: Tensor, step: ProcessedStep) -> Tensor:
        wanted_E1 = step.arguments_E.nan_to_num(0.0).long()[:, None]
        return torch.full_like(logits_EV, -torch.inf).scatter(1, wanted_E1, 0.0)


class Successor:
    """The token after the last one, from a position on; writes into what it is given."""

    name = "successor"

    def __call__(self, logits_EV: Tensor, step: ProcessedStep) -> Tensor:
        due_E = step.positions_E >= step.arguments_E
        logits_EV[due_E, ((step.last_tokens_E + 1) % VOCAB)[due_E].long()] = 1e9
        return logits_EV


class Narrow:
    name = "narrow"

    def __call__(self, logits_EV: Tensor, step: ProcessedStep) -> Tensor:
        del step
        return logits_EV[:, :-1]


def start(processors: Sequence[LogitsProcessor], *, graphs: bool = True) -> Engine:
    device = CpuDevice(captures_graphs=graphs)
    sampler = make_sampler(device.torch_device)
    return build_engine(HashModel(), CONFIG, device, sampler, torch.float32, processors=processors)


def answers(engine: Engine, params: Sequence[SamplingParams]) -> list[list[int]]:
    """Of one request each, with prompts of different lengths."""
    requests = [engine.admission.make_request(prompt_of(n), each) for n, each in enumerate(params)]
    engine.submit(requests)
    tokens: dict[int, list[int]] = defaultdict(list)
    left = len(requests)
    while left:
        record = engine.next_output()
        assert record is not None
        if isinstance(record, EngineFailure):
            raise record.error
        for request_id, token in zip(record.request_ids.tolist(), record.tokens.tolist(), strict=True):
            tokens[request_id].append(token)
        left -= len(record.finished)
    return [tokens[request.request_id] for request in requests]


def prompt_of(number: int) -> list[int]:
    return [number + 1] * (3 * number + 2)


def params(**args: float) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, processor_args=args)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_processor_acts_on_the_rows_that_have_an_argument_and_on_no_other(lookahead: int, graphs: bool):
    engine = start([Only(), Successor()], graphs=graphs)
    try:
        engine.set_lookahead(lookahead)
        asked = [params(only=7.0), params(), params(successor=12.0), params(only=3.0, successor=0.0)]
        for _ in range(2):  # the second time with rows that held other requests, in another order
            only, plain, later, both = answers(engine, asked)
            assert only == [7] * 9
            assert plain == expected_tokens(prompt_of(1), 5 + 9, [])
            known = prompt_of(2)
            for position in range(8, 8 + 9):
                known.append((known[-1] + 1) % VOCAB if position >= 12 else next_token(known))
            assert later == known[8:]
            assert both == [(prompt_of(3)[-1] + 1 + n) % VOCAB for n in range(9)]
        assert answers(engine, [params()] * 5) == [
            expected_tokens(prompt_of(n), 3 * n + 2 + 9, []) for n in range(5)
        ]  # a plain row after one with arguments
    finally:
        engine.close()


def test_arguments_for_a_processor_that_is_not_there_are_refused():
    engine = start([Only()])
    try:
        with pytest.raises(InvalidRequestError, match="no logits processor 'other'; there are only"):
            engine.admission.make_request([1], params(other=1.0))
    finally:
        engine.close()
    engine = start([])
    try:
        with pytest.raises(InvalidRequestError, match="this engine has none"):
            engine.admission.make_request([1], params(only=1.0))
    finally:
        engine.close()


def test_two_processors_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="same name: only, only"):
        start([Only(), Only()])


def test_a_processor_that_returns_another_shape_ends_the_engine_with_its_name():
    engine = start([Narrow()])
    try:
        with pytest.raises(EngineDeadError, match=r"'narrow' returned \(1, 60\), not \(1, 61\)"):
            answers(engine, [params(narrow=1.0)])
    finally:
        engine.close()
