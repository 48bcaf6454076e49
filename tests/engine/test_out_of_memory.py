"""A step that runs out of memory is survived: nobody notices but by the time it takes."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.budget import FIRST_PATIENCE, ONE_TOKEN_TRIES, TokenBudget
from gapless.config import EngineConfig
from gapless.device.base import Note
from gapless.errors import OutOfMemoryError
from gapless.params import SamplingParams
from gapless.request import FinishReason, Request
from gapless.rows import RowState
from support.effort import effort
from support.hash_model import EOS, VOCAB, HashModel, expected_tokens
from support.scarce import SHORTAGES, ScarceDevice, ScarceHarness, ScarceModel, raise_ours
from support.schedules import check_schedule, run_schedule

LOOKAHEADS = [0, 1, 2, 3]


def config(lookahead: int, **options: int) -> EngineConfig:
    sizes = {"max_rows": 6, "max_batch_tokens": 32, "block_size": 4, "num_blocks": 200, **options}
    return EngineConfig(lookahead=lookahead, device="cpu", **sizes)  # pyright: ignore[reportArgumentType]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def add_all(engine: ScarceHarness, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Request]:
    return [engine.add(prompt, greedy(max_tokens)) for prompt in prompts]


def assert_undisturbed(engine: ScarceHarness, requests: Sequence[Request]) -> None:
    for request in requests:
        expected = expected_tokens(request.prompt.tolist(), request.max_length, request.stop_ids.tolist())
        assert engine.tokens[request.request_id] == expected
        assert engine.finished[request.request_id].reason is not FinishReason.CANCELLED


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize(("most", "shortage"), [(1, raise_ours), *zip([2, 5, 12], SHORTAGES, strict=True)])
def test_steps_that_are_too_large_are_made_smaller(lookahead: int, most: int, shortage: Callable[[], None]):
    model = ScarceModel(lambda tokens: tokens > most, shortage)
    with ScarceHarness(config(lookahead), model) as engine:
        requests = add_all(engine, [[n] * (3 + 5 * n) for n in range(9)], max_tokens=12)
        engine.run()
        assert_undisturbed(engine, requests)
        assert engine.scheduler.stats.failed_steps > 0
        assert engine.scheduler.stats.overshoot_rows == 0
        assert next(iter(engine.finished)) == requests[0].request_id


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("seed", range(effort(4, 8)))
def test_failures_at_any_time_leave_every_request_its_tokens(seed: int, lookahead: int):
    luck = random.Random(seed)
    engines: list[ScarceHarness] = []

    def fails(tokens: int) -> bool:
        return luck.random() < 0.15 and (tokens > 1 or not engines[0].scheduler.budget.last_try)

    def build(config: EngineConfig) -> ScarceHarness:
        engines.append(ScarceHarness(config, ScarceModel(fails)))
        return engines[0]

    check_schedule(*run_schedule(seed, lookahead, build=build))


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("seed", range(100, effort(106, 114)))
def test_failures_at_any_place_leave_every_request_its_tokens(seed: int, lookahead: int):
    """Before the table deltas, after the sampler, in either copy: each leaves other things undone behind it."""
    luck = random.Random(seed)
    engines: list[ScarceHarness] = []

    def picks(note: Note) -> str | None:
        lost = engines[0].watched.sizes[note.step] == 1 and engines[0].scheduler.budget.last_try
        if lost or luck.random() > 0.08:
            return None
        return luck.choice(["before", "after"])

    def build(config: EngineConfig) -> ScarceHarness:
        engines.append(ScarceHarness(config, device=ScarceDevice(picks, captures_graphs=seed % 2 == 1)))
        return engines[0]

    check_schedule(*run_schedule(seed, lookahead, build=build))


def test_the_random_failures_do_fail_and_meet_cancels_and_preemptions():
    totals = {"failed": 0, "cancelled": 0, "preempted": 0, "overshoot": 0}
    for seed in range(20):
        luck = random.Random(seed)
        model = ScarceModel(lambda tokens, luck=luck: tokens > 1 and luck.random() < 0.15)
        schedule, engine = run_schedule(seed, 2, build=lambda config, model=model: ScarceHarness(config, model))
        totals["failed"] += engine.scheduler.stats.failed_steps
        totals["cancelled"] += len(schedule.cancelled)
        totals["preempted"] += engine.scheduler.stats.preemptions
        totals["overshoot"] += engine.scheduler.stats.overshoot_rows
    assert min(totals.values()) > 10, totals


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_steps_of_one_token_that_never_have_memory_end_the_engine(lookahead: int):
    with ScarceHarness(config(lookahead), ScarceModel(lambda tokens: True)) as engine:
        add_all(engine, [[1] * 9, [2] * 9], max_tokens=5)
        with pytest.raises(OutOfMemoryError, match="even one token: no memory for the activations"):
            engine.run()
        stats = engine.scheduler.stats
        assert stats.failed_steps == 1 + 5 + ONE_TOKEN_TRIES  # spared, then halved from 32 to 1
        assert engine.watched.sizes[-1] == 1
        assert not engine.finished
        assert not any(engine.tokens.values())


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_a_step_of_one_token_that_fails_now_and_then_is_survived(lookahead: int):
    model = ScarceModel(lambda tokens: tokens == 1)
    with ScarceHarness(config(lookahead), model) as engine:
        for number in range(5):
            model.fails = lambda tokens: tokens == 1 and not engine.scheduler.stats.failed_steps % 2
            request = engine.add([number], greedy(60))
            engine.run()
            assert_undisturbed(engine, [request])
            assert engine.scheduler.stats.failed_steps == 2 * number + 1
            model.fails = lambda tokens: tokens > 1 and engine.scheduler.stats.failed_steps % 2 == 1
            request = engine.add([number] * 2, greedy(100))
            engine.run()
            assert_undisturbed(engine, [request])


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_a_small_step_that_fails_leaves_large_ones_allowed(lookahead: int):
    with ScarceHarness(config(lookahead)) as engine:
        first = add_all(engine, [[1, 2], [3, 4]], max_tokens=12)
        for _ in range(4):
            engine.step()
        for failures in (1, 2):
            engine.fail_next_step()
            while engine.scheduler.stats.failed_steps < failures:
                engine.step()
            assert engine.watched.sizes[-1] == 2
            assert engine.scheduler.budget.tokens == 32 // failures
            for _ in range(3):
                engine.step()
        engine.run()
        assert_undisturbed(engine, first)


class CountingModel(HashModel):
    """Counts its forward passes."""

    forwards = 0

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        self.forwards += 1
        return super().forward(tokens_T, kv, batch)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_a_request_that_is_cancelled_once_its_step_has_failed_ends_once(lookahead: int):
    with ScarceHarness(config(lookahead)) as engine:
        requests = add_all(engine, [[n] * 4 for n in range(5)], max_tokens=30)
        for _ in range(6):
            engine.step()
        engine.fail_next_step()
        while not engine.scheduler.stats.failed_steps:
            engine.step()
        victim, other = (request.request_id for request in requests[:2])
        known = len(engine.tokens[victim])
        assert not engine.scheduler.preempt(other)  # there is nothing left to take from it
        engine.cancel(victim)
        assert not engine.scheduler.cancel(victim)
        engine.loop.check_integrity()
        engine.run()
        assert engine.finished[victim].reason is FinishReason.CANCELLED
        assert engine.finished[victim].generated == known
        assert_undisturbed(engine, [request for request in requests if request.request_id != victim])


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_what_is_queued_behind_a_failed_step_is_not_run(lookahead: int):
    """So that nothing uses tables that the failed step was to change."""
    with ScarceHarness(config(lookahead), CountingModel()) as engine:
        requests = add_all(engine, [[n] * 4 for n in range(3)], max_tokens=20)
        for _ in range(6):
            engine.step()
        model = engine.model
        assert isinstance(model, CountingModel)
        engine.fail_next_step()
        failing = len(engine.watched.sizes)
        while not engine.scheduler.stats.failed_steps:
            engine.step()
        assert len(engine.watched.sizes) == failing + 1 + lookahead
        assert model.forwards == failing
        engine.run()
        assert_undisturbed(engine, requests)


@pytest.mark.parametrize("lookahead", [1, 2, 3])
def test_rows_that_were_preempted_ending_or_stopped_when_a_step_fails_come_out_right(lookahead: int):
    stops = next([n, 7] for n in range(VOCAB) if 4 < len(expected_tokens([n, 7], 40, [EOS])) < 8)
    seen: set[int] = set()
    for steps in range(1, 9):
        with ScarceHarness(config(lookahead)) as engine:
            others = add_all(engine, [[5] * 3, [6] * 3, [8] * 3], max_tokens=8)
            stopping = engine.add(stops, SamplingParams(temperature=0, max_tokens=60))
            for _ in range(steps):
                engine.step()
            engine.fail_next_step()
            engine.step()
            engine.scheduler.preempt(others[1].request_id)
            while engine.loop.has_work:
                if not engine.scheduler.stats.failed_steps:
                    seen |= set(engine.scheduler.rows.state.tolist())
                engine.step()
            assert_undisturbed(engine, [*others, stopping])
    assert seen >= {RowState.ENDING, RowState.PREEMPTED, RowState.DEAD}


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_new_requests_go_on_after_a_failure_that_left_nobody_to_recompute(lookahead: int):
    with ScarceHarness(config(lookahead)) as engine:
        doomed = engine.add([1] * 20, greedy(5))
        engine.fail_next_step()
        engine.step()
        engine.cancel(doomed.request_id)
        engine.run()
        later = add_all(engine, [[2] * 10, [3] * 10], max_tokens=5)
        engine.run()
        assert_undisturbed(engine, later)


def test_a_step_that_fails_before_its_table_deltas_harms_no_request_that_it_did_not_have():
    with ScarceHarness(config(2, max_rows=2, max_batch_tokens=4)) as engine:
        first = engine.add([1] * 14, greedy(2))
        engine.run()
        # The second takes the first one's row, whose blocks are still in the table after the failure. The next step
        # gives one of them to the third, and the step after it writes position 5 of the second over the third's 1.
        second, third = add_all(engine, [[2] * 5, [3] * 4], max_tokens=9)
        engine.fail_next_step()
        engine.run()
        assert engine.scheduler.stats.failed_steps == 1
        assert_undisturbed(engine, [first, second, third])


def good_steps_until(holds: Callable[[], bool], budget: TokenBudget) -> int:
    steps = 0
    while not holds():
        budget.step_succeeded()
        steps += 1
    return steps


def test_the_first_failure_is_spared_and_later_ones_halve_the_budget():
    budget = TokenBudget(100)
    allowed: list[int] = []
    for tokens in (100, 2, 7):
        budget.step_failed(tokens)
        budget.step_succeeded()
        allowed.append(budget.tokens)
    assert allowed == [100, 50, 25]


def test_the_budget_grows_back_slower_after_every_run_of_failures_and_forgets_in_the_end():
    budget = TokenBudget(100)
    budget.step_failed(100)
    waits: list[int] = []
    for _ in range(5):
        budget.step_succeeded()
        budget.step_failed(100)
        waits.append(good_steps_until(lambda: budget.tokens == 100, budget))
    assert waits == [FIRST_PATIENCE * 2**n for n in range(2, 7)]
    good_steps_until(lambda: budget.patience == FIRST_PATIENCE, budget)
    budget.step_failed(100)
    assert budget.tokens == 100


def test_failures_in_a_row_cost_one_doubling_of_the_patience():
    budget = TokenBudget(8192)
    for _ in range(14):
        budget.step_failed(8192)
    assert (budget.tokens, budget.patience) == (1, 2 * FIRST_PATIENCE)


def test_a_budget_of_one_token_is_the_smallest():
    budget = TokenBudget(3)
    for tokens in (3, 3, 1, 1):
        budget.step_failed(tokens)
    assert budget.tokens == 1
    assert not budget.exhausted
    good_steps_until(lambda: budget.tokens == 3, budget)


def test_one_token_is_tried_a_few_times_unless_many_good_steps_come_between():
    budget = TokenBudget(100)
    for _ in range(10):
        budget.step_failed(1)
        good_steps_until(lambda: budget.patience == FIRST_PATIENCE, budget)
    for tokens in (1, 50, 1):
        assert not budget.exhausted
        budget.step_failed(tokens)
        budget.step_succeeded()
    assert budget.last_try
    budget.step_failed(1)
    assert budget.exhausted


def test_the_patience_is_as_long_as_the_longest_recompute():
    """So that a shortage which comes back just before a recompute ends is not forgotten each time."""
    budget = TokenBudget(limit=4, longest=1000)
    rounds = 0
    while not budget.exhausted:
        budget.step_failed(budget.tokens)
        for _ in range(249):  # one good step more, and all is recomputed
            budget.step_succeeded()
        rounds += 1
        assert rounds < 100, "recomputed for ever"


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_the_engine_runs_large_steps_again_once_there_is_memory(lookahead: int):
    model = ScarceModel(lambda tokens: tokens > 4)
    with ScarceHarness(config(lookahead), model) as engine:
        first = add_all(engine, [[n] * 9 for n in range(6)], max_tokens=8)
        while engine.scheduler.budget.tokens > 4:
            engine.step()
        model.fails = lambda tokens: False
        engine.run()
        for _ in range(10):
            engine.add([1], greedy(100))
            engine.run()
        assert engine.scheduler.budget.tokens == 32
        engine.watched.sizes.clear()
        last = engine.add([50] * 32, greedy(2))
        engine.run()
        assert engine.watched.sizes[0] == 32
        assert_undisturbed(engine, [*first, last])


class KeepsakeModel(HashModel):
    """Its forward pass makes tensors and fails while it holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[weakref.ref[Tensor]] = []

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        activations = [torch.zeros(100) for _ in range(3)]
        self.held += [weakref.ref(each) for each in activations]
        if tokens_T.numel() > 8:
            raise_ours()
        return super().forward(tokens_T, kv, batch)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_no_tensor_of_the_failed_step_stays_alive(lookahead: int):
    model = KeepsakeModel()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with ScarceHarness(config(lookahead), model) as engine:
            engine.add([1] * 20, greedy(5))
            while not engine.scheduler.stats.failed_steps:
                engine.step()
            assert model.held
            assert not [each for each in model.held if each() is not None]
    finally:
        if collecting:
            gc.enable()
