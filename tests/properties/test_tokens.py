"""PROPERTIES 14, 16 and 18: nothing past an end, a seed fixes the stream, parameters stay with their request."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from gapless.params import SamplingParams
from gapless.request import FinishReason
from support.sim.faults.masks import OneMaskMissing
from support.sim.forms import HashForm
from support.sim.parts import Parts
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
        others = [move for move in company.moves if move.kind != "update"]  # other weights, another stream
        before = sum(move.kind == "add" and move.point <= point for move in others)
        ours = Move(point, "add", prompt=(7, 7), params=params)
        moves = [dataclasses.replace(m, target=m.target + (m.target >= before)) for m in others]
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


@pytest.mark.parametrize("lookahead", range(5))
def test_what_changes_the_logits_has_seen_the_token_before(lookahead: int):
    """20 and 21 may not come after themselves. Seen a token late they would, as they do unasked. That every penalty
    counts it, too, is a matter of the oracle: tests/properties/test_features.py."""
    few = (20, 21, 22)
    plain = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True, allowed_token_ids=few)
    words = dataclasses.replace(plain, bad_words=[(20, 20), (21, 21)])
    moves = tuple(Move(0, "add", prompt=(7, 7), params=each) for each in (plain, words))
    result = run(dataclasses.replace(BASE, lookahead=lookahead, moves=moves))
    assert result.violation is None, result.violation
    repeats = [sum(a == b < 22 for a, b in itertools.pairwise(result.tokens[number])) for number in range(2)]
    assert repeats[0] > 2
    assert repeats[1] == 0


@pytest.mark.parametrize("lookahead", range(5))
def test_a_mask_is_its_requests_own_and_none_is_none(lookahead: int):
    """Equal requests under different forms. A row whose mask got lost has no token that it could sample, and gets
    token 0: not any token at all."""
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    forms = [HashForm(key, -1, -1, ()) for key in range(6) if 0 not in HashForm(key, -1, -1, ()).allowed([])]
    moves = tuple(Move(0, "add", prompt=(7, 7), params=params, form=(form.key, -1, -1)) for form in forms)
    schedule = dataclasses.replace(BASE, lookahead=lookahead, moves=moves)
    result = run(schedule)
    assert result.violation is None, result.violation
    for number, form in enumerate(forms):
        tokens = result.tokens[number]
        assert all(token in form.allowed(tokens[:at]) for at, token in enumerate(tokens))
    assert len({tuple(tokens) for tokens in result.tokens.values()}) == len(forms) > 3
    lost = run(schedule, Parts(masking=OneMaskMissing)).violation
    assert lost is not None
    assert "told of token 0, which may not come" in lost.text
