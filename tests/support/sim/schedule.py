"""A schedule: the sizes of an engine, what is asked of it and when, and the order in which the device works.

It is plain data, so that it can be generated from a seed, printed, replayed and made smaller.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from gapless.config import SchedulerLimits
from gapless.engine.graphs import mixed_shape
from gapless.engine.layout import StepShape
from gapless.request import SamplingParams
from support.hash_model import VOCAB
from support.sim.model import continuation

Kind = Literal["add", "cancel", "preempt", "exhaust"]
Shortage = Literal[
    "before h2d",
    "after h2d",
    "before compute",
    "between deltas and forward",
    "between forward and sampling",
    "after compute",
    "before d2h",
    "after d2h",
]
SHORTAGES: tuple[Shortage, ...] = get_args(Shortage)
AUDITED = 10  # one seed in so many has the audit
CROWDED = 10  # one seed in so many is a crowd
SALTS = ("", "", "", "a", "b")
PRIORITIES = (0, 0, 0, 0, -1, 1, 2, -1000, 1000)
ARRIVALS = (0, 0, 0, 0, 0, 1, 1500, 3000)
_DEFAULTS = SamplingParams()
_ENDS: tuple[tuple[Kind, ...], ...] = ((), (), (), ("cancel",))
_PAUSES: tuple[tuple[Kind, ...], ...] = ((), (), (), ("preempt",), ("preempt", "preempt"))


@dataclass(frozen=True, slots=True)
class Move:
    """Something that happens at a phase boundary: `point` counts boundaries since the start.

    add      prompt, params, priority and salt of a new request; `arrivals` others came and went since the one before
    cancel, preempt   of the request that was added as number `target`; nothing if that has ended or is not there yet
    exhaust  the next step that is launched runs out of memory, at `where`
    """

    point: int
    kind: Kind
    target: int = -1
    where: Shortage = "before compute"
    prompt: tuple[int, ...] = ()
    params: SamplingParams = _DEFAULTS
    priority: int = 0
    salt: str = ""
    arrivals: int = 0


@dataclass(frozen=True, slots=True)
class Schedule:
    """One run. See gapless.config for the sizes.

    graphs       steps are padded to one of `buckets` or `mixed`, where one holds them, and replayed
    order_seed   the order of the device's work
    eagerness    how far the device lags; None: chosen by order_seed
    reader_lag   records of the engine that lie unread before their consumer looks at them
    audit        each piece of work runs while what it did not declare is rubbish: takes more than twice the time
    """

    lookahead: int
    rows: int
    batch_tokens: int
    block_size: int
    blocks: int
    max_length: int
    graphs: bool
    order_seed: int
    eagerness: float | None
    reader_lag: int
    moves: tuple[Move, ...]
    audit: bool = False

    @property
    def limits(self) -> SchedulerLimits:
        return SchedulerLimits(
            max_rows=self.rows,
            max_batch_tokens=self.batch_tokens,
            max_model_len=self.max_length,
            block_size=self.block_size,
            num_blocks=self.blocks + 1,
        )

    @property
    def buckets(self) -> tuple[int, ...]:
        """Batch sizes of the captured graphs: up to three."""
        return (1, (self.rows + 1) // 2, self.rows) if self.graphs else ()

    @property
    def mixed(self) -> tuple[StepShape, ...]:
        """Shapes of captured steps that read prompts: three, none of which holds all that a step may be."""
        if not self.graphs:
            return ()
        limits, half = self.limits, (self.rows + 1) // 2
        sizes = {(1, 2, 1), (half, 5, half), (self.rows, self.batch_tokens - 1, self.rows)}
        return tuple(mixed_shape(*each, self.rows, limits.max_block_updates) for each in sorted(sizes))

    @property
    def most_steps(self) -> int:
        """Four times as many as if every step had one token, and everything that disturbs lost all work before it."""
        adds = [move for move in self.moves if move.kind == "add"]
        lengths = [len(move.prompt) + (move.params.max_tokens or self.max_length) for move in adds]
        tokens = sum(min(length, self.max_length) for length in lengths)
        disturbances = sum(move.kind in ("preempt", "exhaust") for move in self.moves)
        return 4 * (tokens + self.lookahead + 1) * (1 + disturbances)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        fields: dict[str, Any] = json.loads(text)
        moves = tuple(_move(each) for each in fields.pop("moves"))
        return cls(**fields, moves=moves)


def _move(fields: dict[str, Any]) -> Move:
    params = fields.pop("params")
    params["stop_token_ids"] = tuple(params["stop_token_ids"])
    return replace(Move(**fields, params=SamplingParams(**params)), prompt=tuple(fields["prompt"]))


def generate(seed: int) -> Schedule:
    """The schedule of a seed: few rows, few blocks, small budgets, so that reuse and preemption happen at once."""
    if seed % CROWDED == CROWDED // 2:
        return crowd(seed)
    rng = random.Random(seed)
    order_seed = rng.randrange(2**32)
    rows, block_size, max_length = rng.choice([1, 2, 3, 5]), rng.choice([1, 2, 4]), rng.choice([12, 24, 40])
    least = -(-(max_length - 1) // block_size)
    moves: list[Move] = []
    point = 0
    for number in range(rng.choice([1, 2, 4, 7])):
        point += rng.choice([0, 0, 1, 3, 10, 30, 80])
        any_length = rng.randrange(1, max_length)
        length = rng.choice([1, 2, 7, max_length // 2, max_length - 1, any_length, any_length, any_length])
        begin, salt = _beginning(rng, moves, max_length)
        if begin:
            point += rng.choice([0, 0, 20, 100, 400])  # at once if nothing runs meanwhile
            length = min(max_length - 1, len(begin) + rng.choice([0, 1, 1, 2, 6]))
        moves.append(
            Move(
                point,
                "add",
                prompt=_filled(rng, begin, length),
                params=random_params(rng),
                priority=rng.choice(PRIORITIES),
                salt=salt,
                arrivals=rng.choice(ARRIVALS),
            )
        )
        for kind in (*rng.choice(_ENDS), *rng.choice(_PAUSES)):
            moves.append(Move(point + rng.randrange(120), kind, number))  # noqa: PERF401
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        moves.append(Move(rng.randrange(point + 60), "exhaust", where=rng.choice(SHORTAGES)))  # noqa: PERF401
    return Schedule(
        lookahead=rng.randrange(5),
        rows=rows,
        batch_tokens=rows + rng.choice([0, 1, 3, 20]),
        block_size=block_size,
        blocks=rng.choice([least, least + 1, least + least // 2, 3 * least]),
        max_length=max_length,
        graphs=rng.random() < 0.5,
        order_seed=order_seed,
        eagerness=None,
        reader_lag=rng.choice([0, 0, 1, 3]),
        moves=tuple(sorted(moves, key=lambda move: move.point)),
        audit=seed % AUDITED == AUDITED - 1,
    )


def crowd(seed: int) -> Schedule:
    """Many rows that want blocks at once: all grow in step, or they decode beside long prompts that are preempted."""
    rng = random.Random(seed)
    rows, block_size, max_length, in_step = 8, rng.choice([1, 2, 4]), rng.choice([12, 24]), rng.random() < 0.5
    least, length = -(-(max_length - 1) // block_size), rng.randrange(1, 2 * block_size + 1)
    moves: list[Move] = []
    for number in range(rows):
        size = length if in_step else rng.choice([1, 1, max_length - 1 - rng.randrange(4)])
        begin, salt = _beginning(rng, moves, max_length)
        params = SamplingParams(seed=rng.randrange(2**64), max_tokens=None, ignore_eos=True)
        prompt, priority = _filled(rng, begin, size), rng.choice(PRIORITIES)
        moves.append(Move(0, "add", prompt=prompt, params=params, priority=priority, salt=salt))
        if rng.random() < (0.2 if in_step else 0.7):
            moves.append(Move(rng.randrange(200), rng.choice(("cancel", "preempt", "preempt")), number))
    return Schedule(
        lookahead=rng.choice([0, 0, 1]) if in_step else rng.choice([1, 2, 4]),
        rows=rows,
        batch_tokens=rng.choice([rows, rows * length]) if in_step else rows + rng.randrange(2),
        block_size=block_size,
        blocks=max(least, rows * rng.choice([2, 3])) + rng.randrange(3) if in_step else 2 * least + rng.randrange(rows),
        max_length=max_length,
        graphs=rng.random() < 0.5,
        order_seed=rng.randrange(2**32),
        eagerness=None,
        reader_lag=rng.choice([0, 0, 1, 3]),
        moves=tuple(sorted(moves, key=lambda move: move.point)),
    )


def _beginning(rng: random.Random, moves: list[Move], max_length: int) -> tuple[tuple[int, ...], str]:
    """What a prompt begins with, and its salt: half of them like an earlier prompt, or one with its answer."""
    earlier = [move for move in moves if move.kind == "add"]
    if not earlier or rng.random() < 0.5:
        return (), rng.choice(SALTS)
    other = rng.choice(earlier)
    tokens = other.prompt
    if rng.random() < 0.5:
        tokens += continuation(other.prompt, other.params, max_length)
    cut = rng.choice([len(tokens), rng.randrange(1, len(tokens) + 1)])
    return tokens[:cut], other.salt if rng.random() < 0.8 else rng.choice(SALTS)


def _filled(rng: random.Random, begin: tuple[int, ...], length: int) -> tuple[int, ...]:
    """So many tokens, those behind the beginning at random."""
    return (*begin, *(rng.randrange(VOCAB) for _ in range(length - len(begin))))[:length]


def random_params(rng: random.Random) -> SamplingParams:
    """Of a request that brings its seed."""
    greedy = rng.random() < 0.5
    return SamplingParams(
        temperature=0.0 if greedy else rng.choice([0.3, 1.0, 2.0, rng.uniform(0.01, 3.0)]),
        top_k=0 if greedy else rng.choice([0, 1, 3, 20, rng.randrange(1, VOCAB), VOCAB]),
        top_p=1.0 if greedy else rng.choice([1.0, 0.7, 0.01, rng.uniform(0.01, 1.0)]),
        min_p=0.0 if greedy else rng.choice([0.0, 0.05, 1.0, rng.random()]),
        seed=rng.randrange(2**64),
        max_tokens=rng.choice([None, 1, 2, 5, 17, 40, rng.randrange(1, 40)]),
        stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 1, 6]))),
        ignore_eos=rng.random() < 0.3,
    )
