"""Makes a failing schedule smaller, as long as it fails in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from gapless.params import SamplingParams
from support.sim.schedule import TARGETED, Move, Schedule

_ORDERS = 4  # order seeds that are tried
_PLAIN = SamplingParams()
_FEATURES = (
    "n",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "logprobs",
    "prompt_logprobs",
    "processor_args",
)


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool], budget: int = 2000) -> Schedule:
    """The smallest schedule found that still fails: fewer moves first, then smaller ones, sizes and order.

    budget  the most schedules that are tried.
    """
    tried = 0
    improved = True
    while improved:
        improved = False
        for candidate in _smaller(schedule):
            tried += 1
            if tried > budget:
                return schedule
            if fails(candidate):
                schedule, improved = candidate, True
                break
    return schedule


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    """Simpler neighbours, the boldest first."""
    moves = schedule.moves
    size = len(moves) // 2
    while size:
        for start in range(0, len(moves), size):
            yield replace(schedule, moves=_without(moves, set(range(start, min(start + size, len(moves))))))
        size //= 2
    for name, values in (
        ("lookahead", range(schedule.lookahead)),
        ("graphs", [False] * schedule.graphs),
        ("audit", [False] * schedule.audit),
        ("reader_lag", [0] * (schedule.reader_lag > 0)),
        ("rows", range(1, schedule.rows)),
        ("batch_tokens", range(schedule.rows, schedule.batch_tokens)),
        ("blocks", range(-(-(schedule.max_length - 1) // schedule.block_size), schedule.blocks)),
        ("order_seed", range(min(schedule.order_seed, _ORDERS))),
    ):
        for value in values:
            yield replace(schedule, **{name: value})
    if schedule.eagerness is None:
        yield replace(schedule, eagerness=1.0)
        yield replace(schedule, eagerness=0.0)
    for index, move in enumerate(moves):
        for smaller in _smaller_move(move):
            changed = sorted((*moves[:index], smaller, *moves[index + 1 :]), key=lambda each: each.point)
            if _same_adds(moves, changed, index, smaller):
                yield replace(schedule, moves=tuple(changed))


def _same_adds(moves: tuple[Move, ...], changed: list[Move], index: int, smaller: Move) -> bool:
    """Whether the requests still come in the same order, so that targets mean what they meant."""
    before = [smaller if place == index else each for place, each in enumerate(moves)]
    return [each for each in before if each.kind == "add"] == [each for each in changed if each.kind == "add"]


def _smaller_move(move: Move) -> Iterator[Move]:
    for point in (0, move.point // 2, move.point - 1):
        if 0 <= point < move.point:
            yield replace(move, point=point)
    if move.kind != "add":
        return
    for size in (1, len(move.prompt) // 2, len(move.prompt) - 1):
        if 0 < size < len(move.prompt):
            yield replace(move, prompt=move.prompt[:size])
    params = move.params
    for name, plain in (("priority", 0), ("salt", ""), ("arrivals", 0), ("endings", ()), ("form", None)):
        if getattr(move, name) != plain:
            yield replace(move, **{name: plain})
    for name in _FEATURES:
        if getattr(params, name) != getattr(_PLAIN, name):
            yield replace(move, params=replace(params, **{name: getattr(_PLAIN, name)}))
    if not params.greedy:
        yield replace(move, params=replace(params, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0))
    if params.stop_token_ids:
        yield replace(move, params=replace(params, stop_token_ids=(), ignore_eos=True))
    for tokens in (1, (params.max_tokens or 2) // 2, (params.max_tokens or 2) - 1):
        if 0 < tokens < (params.max_tokens or 2):
            yield replace(move, params=replace(params, max_tokens=tokens, min_tokens=min(tokens, params.min_tokens)))


def _without(moves: tuple[Move, ...], gone: set[int]) -> tuple[Move, ...]:
    """The moves without some of them, and without those whose target is gone; targets renumbered."""
    numbers: dict[int, int] = {}
    count = 0
    for index, move in enumerate(moves):
        if move.kind == "add":
            if index not in gone:
                numbers[count] = len(numbers)
            count += 1
    kept: list[Move] = []
    for index, move in enumerate(moves):
        if index in gone:
            continue
        if move.kind not in TARGETED:
            kept.append(move)
        elif move.target in numbers:
            kept.append(replace(move, target=numbers[move.target]))
    return tuple(kept)
