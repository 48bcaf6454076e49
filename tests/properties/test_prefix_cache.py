"""What the prefix cache spares: the tokens that are fed are those whose KV nobody has, and the answers are the same.

Every run compares all answers with the oracle's, and `Finished.cached` with the plans.
"""

from __future__ import annotations

import dataclasses

import pytest

from gapless.params import SamplingParams
from support.sim.fed import run_fed, tokens_fed
from support.sim.oracle import continuation
from support.sim.schedule import Move, Schedule

LOOKAHEADS = range(3)
LATER = 10_000  # once all before it have ended
BASE = Schedule(
    lookahead=0,
    rows=3,
    batch_tokens=7,
    block_size=4,
    blocks=40,
    max_length=40,
    graphs=False,
    order_seed=5,
    eagerness=None,
    reader_lag=0,
    moves=(),
)
NEW = 6
PARAMS = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
PROMPT = tuple(range(1, 34))


def add(point: int, prompt: tuple[int, ...], salt: str = "") -> Move:
    return Move(point, "add", prompt=prompt, params=PARAMS, salt=salt)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 9, 32, 33])
@pytest.mark.parametrize("point", [120, LATER], ids=["beside", "after"])
def test_of_two_equal_prompts_the_second_computes_only_what_is_not_there(lookahead: int, size: int, point: int):
    """All full blocks but one that has the last token are there: while the first decodes, and when it has ended."""
    moves = (add(0, PROMPT[:size]), add(point, PROMPT[:size]))
    result, scheduler = run_fed(dataclasses.replace(BASE, lookahead=lookahead, moves=moves))
    there = (size - 1) // 4 * 4
    assert [result.finished[number].cached for number in (0, 1)] == [0, there]
    assert tokens_fed(scheduler) == {0: size + NEW - 1, 1: size - there + NEW - 1}
    assert result.tokens[0] == result.tokens[1]


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("more", [1, 2, 5])
def test_a_prompt_that_goes_on_from_an_answer_computes_what_came_after_it(lookahead: int, more: int):
    """As a chat's next turn. The answer's last token was never fed, so its block is not there."""
    first = PROMPT[:10]
    answer = continuation(first, PARAMS, BASE.max_length)
    second = (*first, *answer, *range(40, 40 + more))
    moves = (add(0, first), add(LATER, second))
    result, scheduler = run_fed(dataclasses.replace(BASE, lookahead=lookahead, moves=moves))
    there = (len(first) + len(answer) - 1) // 4 * 4
    assert result.finished[1].cached == there == 12
    assert tokens_fed(scheduler)[1] == len(second) - there + NEW - 1
    assert result.shared[0].answer


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("point", [0, 120, LATER])
def test_equal_prompts_under_different_salts_share_nothing(lookahead: int, point: int):
    moves = tuple(add(point * number, PROMPT, salt) for number, salt in enumerate(("", "a", "b")))
    result, scheduler = run_fed(dataclasses.replace(BASE, lookahead=lookahead, moves=moves))
    assert [end.cached for end in result.finished.values()] == [0, 0, 0]
    assert set(tokens_fed(scheduler).values()) == {len(PROMPT) + NEW - 1}
    assert result.shared == []
    again = dataclasses.replace(BASE, lookahead=lookahead, moves=(*moves, add(2 * LATER + 1, PROMPT, "a")))
    assert run_fed(again)[0].finished[3].cached == 32


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_who_was_preempted_computes_again_only_what_was_not_kept(lookahead: int):
    """Full blocks are kept while nobody wants their room: less than a block is lost each time."""
    preemptions = lost = 0
    for point in range(0, 160, 3):
        moves = (add(0, PROMPT), Move(point, "preempt", 0))
        result, scheduler = run_fed(dataclasses.replace(BASE, lookahead=lookahead, moves=moves))
        again = scheduler.stats.recomputed_tokens
        assert tokens_fed(scheduler)[0] == len(PROMPT) + NEW - 1 + again
        assert again <= BASE.block_size * result.preemptions
        preemptions, lost = preemptions + result.preemptions, lost + again
    assert preemptions > 10
    assert lost > 0


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_what_was_evicted_is_computed_again_and_right(lookahead: int):
    """Others take all blocks but those that hold the beginning, which go last, then those as well."""
    other = tuple(range(60, 60 - len(PROMPT), -1))
    moves = (add(0, PROMPT), add(LATER, other), add(2 * LATER, PROMPT), add(3 * LATER, PROMPT))
    cached: list[int] = []
    for blocks in (20, 14, 10):
        tight = dataclasses.replace(BASE, lookahead=lookahead, blocks=blocks, moves=moves)
        result, scheduler = run_fed(tight)
        fed = tokens_fed(scheduler)
        assert all(fed[number] == len(PROMPT) - result.finished[number].cached + NEW - 1 for number in range(4))
        assert result.finished[3].cached == 32
        cached.append(result.finished[2].cached)
    assert cached == [32, 16, 0]
