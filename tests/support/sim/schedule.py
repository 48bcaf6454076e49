"""A schedule: the sizes of an engine, what is asked of it and when, and the order in which the device works.

It is plain data, so that it can be generated from a seed, printed, replayed and made smaller.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from gapless.config import SchedulerLimits
from gapless.engine.core import InFlight
from gapless.engine.graphs import mixed_shape
from gapless.engine.layout import StepShape
from gapless.params import SamplingParams
from support.hash_model import VOCAB
from support.sim.oracle import FIRST, Weights, continuation

Kind = Literal["add", "cancel", "preempt", "exhaust", "pause", "resume", "update", "sleep", "wake"]
TARGETED: tuple[Kind, ...] = ("cancel", "preempt")
Shortage = Literal[
    "before h2d",
    "after h2d",
    "before compute",
    "before take rows",
    "between deltas and forward",
    "before score",
    "before copy masks",
    "after copy masks",
    "between forward and sampling",
    "after sample",
    "after compute",
    "before d2h",
    "after d2h",
]
SHORTAGES: tuple[Shortage, ...] = get_args(Shortage)
AUDITED = 10  # one seed in so many has the audit
COMMANDED = 3  # one seed in so many has work between steps
CROWDED = 10  # one seed in so many is a crowd
LINE_NUMBERS = 128  # of a step's newcomers: what one of them needs at the most
SALTS = ("", "", "", "a", "b")
PRIORITIES = (0, 0, 0, 0, -1, 1, 2, -1000, 1000)
ARRIVALS = (0, 0, 0, 0, 0, 1, 1500, 3000)
_DEFAULTS = SamplingParams()
_UNDONE_BY: dict[Kind, Kind] = {"pause": "resume", "sleep": "wake"}
_ENDS: tuple[tuple[Kind, ...], ...] = ((), (), (), ("cancel",))
_PAUSES: tuple[tuple[Kind, ...], ...] = ((), (), (), ("preempt",), ("preempt", "preempt"))


@dataclass(frozen=True, slots=True)
class Move:
    """Something that happens at a phase boundary: `point` counts boundaries since the start.

    add      prompt, params, priority and salt of a new request, or of params.n; `arrivals` others came and went since
             the one before
    cancel, preempt   of the request that was added as number `target`, the one at `place` if it is one of n; nothing
             if that has ended or is not there
    exhaust  the next step that is launched and comes by `where` runs out of memory there

    pause, resume, update, sleep, wake   the engine between two steps; `in_flight` says what becomes of requests that
             have begun when the weights change

    endings  sequences of tokens that end the request.
    form     of the answer: key, ends and fails of forms.py HashForm.
    weights  that the answer comes from, as the rig has seen it.
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
    place: int = 0
    endings: tuple[tuple[int, ...], ...] = ()
    form: tuple[int, int, int] | None = None
    in_flight: InFlight = "finish"
    weights: Weights = FIRST


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
    prefix_cache: bool = True

    @property
    def limits(self) -> SchedulerLimits:
        return SchedulerLimits(
            max_rows=self.rows,
            max_batch_tokens=self.batch_tokens,
            max_model_len=self.max_length,
            block_size=self.block_size,
            num_blocks=self.blocks + 1,
            prefix_cache=self.prefix_cache,
            max_line_numbers=LINE_NUMBERS,
            num_processors=1,
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
        lengths = [(len(move.prompt) + (move.params.max_tokens or self.max_length), move.params.n) for move in adds]
        tokens = sum(min(length, self.max_length) * n for length, n in lengths)
        disturbances = sum(move.kind in ("preempt", "exhaust", "update", "sleep") for move in self.moves)
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
    del params["grammar_spec"]
    return replace(
        Move(**fields, params=SamplingParams(**params)),
        prompt=tuple(fields["prompt"]),
        endings=tuple(map(tuple, fields["endings"])),
        form=fields["form"] and tuple(fields["form"]),
        weights=tuple((begin, key) for begin, key in fields["weights"]),
    )


def generate(seed: int) -> Schedule:
    """The schedule of a seed."""
    schedule = crowd(seed) if seed % CROWDED == CROWDED // 2 else varied(seed)
    return schedule if seed % COMMANDED else with_commands(schedule, seed)


def varied(seed: int) -> Schedule:
    """Few rows, few blocks, small budgets, so that reuse and preemption happen at once."""
    rng = random.Random(seed)
    order_seed = rng.randrange(2**32)
    rows, block_size, max_length = rng.choice([1, 2, 3, 5]), rng.choice([1, 2, 4]), rng.choice([12, 24, 40])
    least, featured = -(-(max_length - 1) // block_size), rng.choice([0.0, 0.5, 0.8])
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
        move = Move(
            point,
            "add",
            prompt=_filled(rng, begin, length),
            params=random_params(rng),
            priority=rng.choice(PRIORITIES),
            salt=salt,
            arrivals=rng.choice(ARRIVALS),
        )
        if rng.random() < featured:
            move = with_features(rng, move)
        moves.append(move)
        for kind in (*rng.choice(_ENDS), *rng.choice(_PAUSES)):
            moves.append(Move(point + rng.randrange(120), kind, number, place=rng.randrange(move.params.n)))  # noqa: PERF401
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
        prefix_cache=rng.random() < 0.85,
    )


def crowd(seed: int) -> Schedule:
    """Many rows that want blocks at once: all grow in step, or they decode beside long prompts that are preempted."""
    rng = random.Random(seed)
    rows, block_size, max_length, in_step = 8, rng.choice([1, 2, 4]), rng.choice([12, 24]), rng.random() < 0.5
    featured = rng.choice([0.0, 0.0, 0.5])
    least, length = -(-(max_length - 1) // block_size), rng.randrange(1, 2 * block_size + 1)
    moves: list[Move] = []
    for number in range(rows):
        size = length if in_step else rng.choice([1, 1, max_length - 1 - rng.randrange(4)])
        begin, salt = _beginning(rng, moves, max_length)
        params = SamplingParams(seed=rng.randrange(2**64), max_tokens=None, ignore_eos=True)
        prompt, priority = _filled(rng, begin, size), rng.choice(PRIORITIES)
        move = Move(0, "add", prompt=prompt, params=params, priority=priority, salt=salt)
        moves.append(with_features(rng, move, ends=False) if rng.random() < featured else move)
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


def with_commands(schedule: Schedule, seed: int) -> Schedule:
    """The same with work between its steps: pauses and sleeps that end, updates of the weights."""
    rng = random.Random(f"between steps {seed}")
    last = schedule.moves[-1].point + 60
    moves = [*schedule.moves]
    for _ in range(rng.choice([1, 1, 2, 4])):
        point, kind = rng.randrange(last), rng.choice(("pause", "sleep", "update", "update", "update"))
        moves.append(Move(point, kind, in_flight=rng.choice(get_args(InFlight))))
        if end := _UNDONE_BY.get(kind):
            if rng.random() < 0.5:
                moves.append(Move(point + rng.choice([0, 20]), "update", in_flight=rng.choice(get_args(InFlight))))
            moves.append(Move(point + rng.choice([0, 1, 20, 100]), rng.choice((end, end, end, "resume", "wake"))))
    return replace(schedule, moves=tuple(sorted(moves, key=lambda move: move.point)))


def commanded(seed: int) -> Schedule:
    """The schedule of a seed, with work between its steps."""
    return with_commands(varied(seed), seed)


def interrupted(seed: int) -> Schedule:
    """The schedule of a seed, where moreover a step that brings new rows their features runs out of memory."""
    schedule, rng = generate(seed), random.Random(seed)
    last = schedule.moves[-1].point + 60
    moves = (*schedule.moves, Move(rng.randrange(last), "exhaust", where="before take rows"))
    return replace(schedule, moves=tuple(sorted(moves, key=lambda move: move.point)))


def _beginning(rng: random.Random, moves: list[Move], max_length: int) -> tuple[tuple[int, ...], str]:
    """What a prompt begins with, and its salt: half of them like an earlier prompt, or one with its answer."""
    earlier = [move for move in moves if move.kind == "add"]
    if not earlier or rng.random() < 0.5:
        return (), rng.choice(SALTS)
    other = rng.choice(earlier)
    tokens = other.prompt
    if rng.random() < 0.5:
        tokens += continuation(other.prompt, other.params, max_length, other.endings, other.form)
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


def with_features(rng: random.Random, move: Move, *, ends: bool = True) -> Move:
    """The same request with some of everything that can be asked of an answer.

    ends  also with what can end it, or make it several.
    """
    params = move.params

    def some(most: int) -> tuple[int, ...]:
        return tuple(rng.choices(move.prompt, k=1) + rng.sample(range(VOCAB), rng.randrange(1, most)))

    if rng.random() < 0.4:
        params = replace(params, repetition_penalty=rng.choice([0.5, 1.3, 3.0]))
    if rng.random() < 0.4:
        presence, frequency = rng.choice([-2.0, 1.1, 2.0]), rng.choice([-0.3, 0.7, 2.0])
        params = replace(params, presence_penalty=presence, frequency_penalty=frequency)
    if rng.random() < 0.3:
        params = replace(params, logit_bias={token: rng.choice([-100.0, -1.5, 2.3, 5.0]) for token in some(8)})
    if rng.random() < 0.3:
        params = replace(params, logprobs=rng.choice([0, 1, 3, 20]))
    if rng.random() < 0.3:
        params = replace(params, prompt_logprobs=rng.choice([0, 1, 3, 20]))
    if rng.random() < 0.2:
        params = replace(params, processor_args={"tilt": rng.choice([-0.5, 1.0])})
    form = None
    if rng.random() < 0.4:
        form = (rng.randrange(2**31), rng.choice([-1, 0, 2, 9]), rng.choice([-1, -1, 0, 3, 12]) if ends else -1)
        if not ends:
            form = (form[0], -1, -1)
    else:
        allowed = tuple(sorted({*some(9), *rng.sample(range(VOCAB), 20)})) if rng.random() < 0.3 else None
        words = [some(4)[:1] * rng.randrange(2) + some(3) for _ in range(rng.choice([0, 0, 2, 3]))]
        params = replace(params, allowed_token_ids=allowed, bad_words=words)
    if not ends:
        return replace(move, params=params, form=form)
    if rng.random() < 0.4:
        params = replace(params, min_tokens=rng.randrange(1, min(12, params.max_tokens or 12) + 1))
    endings = tuple(some(3)[1:] for _ in range(rng.choice([0, 0, 1, 3])))
    return replace(move, params=replace(params, n=rng.choice([1, 1, 2, 4])), form=form, endings=endings)
