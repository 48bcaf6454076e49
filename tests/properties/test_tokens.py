"""PROPERTIES 14, 16 and 18: nothing past an end, a seed fixes the stream, parameters stay with their request."""

from __future__ import annotations

import dataclasses
import random

import pytest

from gapless.request import FinishReason, SamplingParams
from support.sim.rig import run
from support.sim.schedule import Move, Schedule, generate

BASE = Schedule(
    lookahead=0,
    rows=3,
    batch_tokens=6,
    block_size=2,
    blocks=40,
    max_length=24,
    graphs=False,
    order_seed=5,
    eagerness=None,
    reader_lag=0,
    moves=(),
)


@pytest.mark.parametrize("lookahead", range(5))
def test_a_row_that_ends_by_length_is_never_run_once_more(lookahead: int):
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=7)
    moves = tuple(Move(4 * n, "add", prompt=(n,) * (n + 1), params=params) for n in range(6))
    to_the_context_limit = Move(30, "add", prompt=(9,) * 3, params=dataclasses.replace(params, max_tokens=None))
    result = run(dataclasses.replace(BASE, lookahead=lookahead, moves=(*moves, to_the_context_limit)))
    assert result.violation is None, result.violation
    assert result.overshoot == 0
    assert {end.reason for end in result.finished.values()} == {FinishReason.LENGTH}
    assert [end.generated for end in result.finished.values()] == [7] * 6 + [24 - 3]


@pytest.mark.parametrize("lookahead", range(5))
def test_after_a_stop_nothing_is_emitted_or_counted_and_at_most_lookahead_rows_are_discarded(lookahead: int):
    stops = tuple(range(0, 61, 3))
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=None, stop_token_ids=stops)
    moves = tuple(Move(0, "add", prompt=(n, 1), params=params) for n in range(8))
    result = run(dataclasses.replace(BASE, lookahead=lookahead, moves=moves))
    assert result.violation is None, result.violation
    stopped = [number for number, end in result.finished.items() if end.reason is FinishReason.STOP]
    assert len(stopped) > 4
    for request_id in stopped:
        tokens = result.tokens[request_id]
        assert [token for token in tokens if token in stops or token == 0] == tokens[-1:]
        assert result.finished[request_id].generated == len(tokens)
    assert result.overshoot <= lookahead * len(stopped)


def test_a_seed_gives_the_same_stream_in_any_company_row_order_and_lookahead():
    params = SamplingParams(temperature=1.0, top_p=0.7, seed=2**63 + 5, max_tokens=10, ignore_eos=True)
    streams: set[tuple[int, ...]] = set()
    for seed in range(60):
        rng = random.Random(seed)
        company = generate(seed)
        point = rng.randrange(40)
        before = sum(move.kind == "add" and move.point <= point for move in company.moves)
        ours = Move(point, "add", prompt=(7, 7), params=params)
        moves = [dataclasses.replace(m, target=m.target + (m.target >= before)) for m in company.moves]
        moves = sorted((*moves, ours), key=lambda move: move.point)
        result = run(dataclasses.replace(company, max_length=40, blocks=60, moves=tuple(moves)))
        assert result.violation is None, (seed, result.violation)
        [request] = [each for each in result.requests if each.params is params]
        streams.add(tuple(result.tokens[request.request_id]))
    assert len(streams) == 1


def test_the_parameters_of_a_request_are_its_own():
    """Every parameter of a row changes the token that the rig's sampler draws, so another request's would show. Here
    all requests have the same prompt and seed, and differ in one parameter each."""
    base = SamplingParams(temperature=1.0, seed=1, max_tokens=8, ignore_eos=True)
    changes = [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"seed": 2},
        {"temperature": 0.0},
    ]
    moves = tuple(Move(0, "add", prompt=(7, 7), params=dataclasses.replace(base, **each)) for each in changes)
    for seed in range(20):
        result = run(dataclasses.replace(BASE, lookahead=seed % 5, order_seed=seed, moves=moves))
        assert result.violation is None, (seed, result.violation)
        assert len({tuple(tokens) for tokens in result.tokens.values()}) == len(changes)
