"""How one step's inputs lie in a slot's packed buffer, so that a step needs a single copy to the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import cache, lru_cache

import torch
from torch import Tensor

from gapless.config import SchedulerLimits
from gapless.engine.tables import DecodeTables
from gapless.plan import Plan


class Edits(Enum):
    """What comes between logits and sampling: each has a graph of its own."""

    NONE = "none"
    FEATURES = "features"  # tokens are counted, logits edited, log probabilities taken
    MASKED = "masked"  # all that, and masks from the host

    @classmethod
    def of(cls, plan: Plan) -> Edits:
        if plan.masked:
            return cls.MASKED
        return cls.FEATURES if plan.featured else cls.NONE


@dataclass(frozen=True, slots=True)
class StepShape:
    """Counts that fix the layout and, on the device, the shapes: what a graph is captured for.

    tokens T, entries E, samples S, most block updates U, rows with new parameters A. The first `decodes` of the entries
    and of the tokens are for entries with one token: where there are fewer of them, padding stands between them and
    the chunks.
    """

    tokens: int
    decodes: int
    entries: int
    samples: int
    updates: int
    admitted: int

    @classmethod
    @cache
    def decode(cls, bucket: int) -> StepShape:
        """A step of `bucket` rows that decode one token each; none is new, each may gain a block."""
        return cls(bucket, bucket, bucket, bucket, bucket, 0)

    @classmethod
    def of(cls, plan: Plan) -> StepShape:
        """Without padding."""
        return cls(
            tokens=plan.num_tokens,
            decodes=plan.num_decodes,
            entries=plan.rows_E.size,
            samples=plan.num_samples,
            updates=plan.block_ids_U.size,
            admitted=plan.params.rows_A.size,
        )

    @property
    def decodes_only(self) -> bool:
        """Every entry has one token, and samples; no row is new."""
        return self.tokens == self.decodes == self.samples and not self.admitted

    def with_places(self, decodes: int) -> StepShape:
        """With padding up to so many decodes."""
        gap = decodes - self.decodes
        return replace(self, tokens=self.tokens + gap, decodes=decodes, entries=self.entries + gap)

    @property
    def chunks(self) -> int:
        """Entries after the decodes."""
        return self.entries - self.decodes

    @property
    def chunk_tokens(self) -> int:
        return self.tokens - self.decodes


@dataclass(frozen=True, slots=True)
class Sections:
    """[begin, end) of each input in the packed int32 buffer. float32 and 64-bit values keep their bits.

    header_2     whether the decodes of the step before go on, a position later; how many block updates there are
    updates_3U   their rows, then their columns, then their blocks, with nothing between
    """

    header_2: slice
    updates_3U: slice
    tokens_T: slice
    token_rows_T: slice
    positions_T: slice
    rows_E: slice
    kv_len_E: slice
    query_start_E1: slice
    sample_tokens_S: slice  # index in T of the token whose hidden state is sampled from
    sample_rows_S: slice
    sample_positions_S: slice  # position that the sampled token will have
    param_rows_A: slice
    temperature_A: slice
    top_k_A: slice
    top_p_A: slice
    min_p_A: slice
    seed_A2: slice
    total: int


HEADER = 2
_ALIGNMENT = 4  # int32 numbers
_NOWHERE = slice(0, 0)


# The shapes of graphs come again and again. Other shapes hardly do, and would only pile up in a larger cache.
@lru_cache(maxsize=128)
def sections_of(shape: StepShape) -> Sections:
    """The layout of a shape.

    Of decodes only, rows and positions are all that is sent, since the rest follows; block updates come before them, so
    that a step whose decodes go on sends nothing else. Otherwise block updates are the last, as a step may have few.
    """
    t, e, s, u, a = shape.tokens, shape.entries, shape.samples, shape.updates, shape.admitted
    tokens = {"tokens_T": t, "token_rows_T": t, "positions_T": t}
    updates = {"updates_3U": 3 * u}
    if shape.decodes_only:
        sizes = {"header_2": HEADER, **updates, **tokens}
    else:
        entries = {"rows_E": e, "kv_len_E": e, "query_start_E1": e + 1}
        samples = {"sample_tokens_S": s, "sample_rows_S": s, "sample_positions_S": s}
        params = {"param_rows_A": a, "temperature_A": a, "top_k_A": a, "top_p_A": a, "min_p_A": a, "seed_A2": 2 * a}
        sizes = {"header_2": HEADER, **tokens, **entries, **samples, **params, **updates}
    slices = {name: _NOWHERE for name in Sections.__slots__ if name != "total"}
    begin = 0
    for name, size in sizes.items():
        slices[name] = slice(begin, begin + size)
        begin += _aligned(size)
    return Sections(**slices, total=begin)


def _aligned(size: int) -> int:
    """Kernels are compiled for addresses that are multiples of 16 bytes, and anew for each one that is not."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class Extras:
    """What few steps have, behind the sections that all have: see plan.py RowLines and PromptScores."""

    rows_A: slice
    begins_A1: slice
    lines_P: slice
    tokens_K: slice
    token_rows_K: slice
    positions_K: slice
    arguments_G: slice
    indices_Q: slice
    targets_Q: slice
    wanted_Q: slice
    total: int

    @classmethod
    def of(cls, plan: Plan, shape: StepShape) -> Extras:
        """Where they are, for kernels that no graph holds."""
        lines, scores = plan.lines, plan.scores
        a = p = k = g = 0
        if lines is not None:
            a, p, k, g = lines.rows_A.size, lines.lines_P.size, lines.tokens_K.size, lines.arguments_G.size
        q = 0 if scores is None else scores.indices_Q.size
        return cls.behind(sections_of(shape).total, a, p, k, g, q)

    @classmethod
    def behind(cls, begin: int, a: int, p: int, k: int, g: int, q: int) -> Extras:
        """Of these sizes, from `begin` on."""
        slices: list[slice] = []
        for size in (a, a + 1, p, k, k, k, g, q, q, q):
            slices.append(slice(begin, begin + size))
            begin += _aligned(size)
        return cls(*slices, total=begin)


def most_extras(limits: SchedulerLimits) -> int:
    """int32 numbers that they can need."""
    rows, tokens = limits.max_rows, limits.max_batch_tokens
    arguments = rows * limits.num_processors
    return Extras.behind(0, rows, limits.max_line_numbers, limits.max_model_len, arguments, tokens).total


def sent_size(plan: Plan, shape: StepShape) -> int:
    """How much of the packed buffer a step copies."""
    at = sections_of(shape)
    if plan.lines is not None or plan.scores is not None:
        return Extras.of(plan, shape).total
    updates = 3 * plan.block_ids_U.size
    if plan.continues or not shape.decodes_only:
        return at.updates_3U.start + updates
    return at.total


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step's inputs on the device, one tensor each; see Sections. seed_A2 holds (low, high) words.

    Where all entries decode, rows, positions and lengths are those of the device's own tables, which `sent_rows_E` and
    `sent_positions_E` bring up to date unless the decodes go on; else these two are empty.
    """

    header_2: Tensor
    updates_3U: Tensor
    tokens_T: Tensor
    sent_rows_E: Tensor
    sent_positions_E: Tensor
    token_rows_T: Tensor
    positions_T: Tensor
    rows_E: Tensor
    kv_len_E: Tensor
    query_start_E1: Tensor
    sample_tokens_S: Tensor
    sample_rows_S: Tensor
    sample_positions_S: Tensor
    param_rows_A: Tensor
    temperature_A: Tensor
    top_k_A: Tensor
    top_p_A: Tensor
    min_p_A: Tensor
    seed_A2: Tensor

    @classmethod
    def of(cls, packed: Tensor, shape: StepShape, decodes: DecodeTables) -> StepInputs:
        """Views of `packed`, an int32 device buffer filled in this shape's layout, and of the tables."""
        at = sections_of(shape)

        def floats(section: slice) -> Tensor:
            return packed[section].view(torch.float32)

        rows_T, positions_T = packed[at.token_rows_T], packed[at.positions_T]
        if shape.decodes_only:
            rows_E, lengths_E = decodes.rows_E[: shape.entries], decodes.lengths_E[: shape.entries]
            sent = {"sent_rows_E": rows_T, "sent_positions_E": positions_T}
            tokens = {"token_rows_T": rows_E, "positions_T": decodes.positions_E[: shape.entries]}
            starts_E1 = decodes.numbers_E1[: shape.entries + 1]
            entries = {"rows_E": rows_E, "kv_len_E": lengths_E, "query_start_E1": starts_E1}
            samples = {
                "sample_tokens_S": starts_E1[:-1],
                "sample_rows_S": rows_E,
                "sample_positions_S": lengths_E,
            }
        else:
            sent = {"sent_rows_E": rows_T[:0], "sent_positions_E": positions_T[:0]}
            tokens = {"token_rows_T": rows_T, "positions_T": positions_T}
            entries = {
                "rows_E": packed[at.rows_E],
                "kv_len_E": packed[at.kv_len_E],
                "query_start_E1": packed[at.query_start_E1],
            }
            samples = {
                "sample_tokens_S": packed[at.sample_tokens_S],
                "sample_rows_S": packed[at.sample_rows_S],
                "sample_positions_S": packed[at.sample_positions_S],
            }
        return cls(
            header_2=packed[at.header_2],
            updates_3U=packed[at.updates_3U],
            tokens_T=packed[at.tokens_T],
            **sent,
            **tokens,
            **entries,
            **samples,
            param_rows_A=packed[at.param_rows_A],
            temperature_A=floats(at.temperature_A),
            top_k_A=packed[at.top_k_A],
            top_p_A=floats(at.top_p_A),
            min_p_A=floats(at.min_p_A),
            seed_A2=packed[at.seed_A2].view(-1, 2),
        )

    def continues(self) -> bool:
        """Whether the decodes of the step before go on. Reads the buffer: on a CPU only."""
        return bool(self.header_2[0])

    def block_updates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and blocks of the block updates. Reads the buffer: on a CPU only."""
        count = int(self.header_2[1])
        rows_U, columns_U, ids_U = self.updates_3U[: 3 * count].view(3, count)
        return rows_U, columns_U, ids_U
