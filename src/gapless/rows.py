"""Per-row state of running sequences, as arrays indexed by row, so that a step costs a few numpy calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from gapless.plan import PLACEHOLDER, Ints
from gapless.request import Request

MIN_STOP_WIDTH = 4


class RowState:
    """The life of a row. Only RUNNING rows are planned; the others drain until their last step has retired.

    Plain integers: numpy compares an array with them five times faster than with an IntEnum's members.
    """

    FREE: Final = 0
    RUNNING: Final = 1
    ENDING: Final = 2  # its last token has been scheduled
    PREEMPTED: Final = 3  # its blocks are wanted; tokens in flight still count
    DEAD: Final = 4  # finished or cancelled; tokens in flight are overshoot


class RowTable:
    """R rows of L tokens and C block columns.

    length     tokens scheduled: known ones and placeholders in flight
    known      tokens known to the host; length - known is what is in flight
    computed   tokens whose KV has been launched
    taken      tokens that were known when the row was taken
    limit      length at which the request ends
    last_step  newest step that has this row, -1 for none
    rank       of its request: the lower, the earlier it is served
    stop_line  of its stop strings in the StopTable
    featured   whether it asks something of its logits
    stale      whether the device's tables have an earlier owner's features
    processed  whether it has arguments for logits processors
    masked     whether its answer must have a form
    logprobs   how many logprobs beside the sampled token's; -1: none at all
    scores     the same of the prompt
    """

    def __init__(self, rows: int, max_length: int, columns: int) -> None:
        self.state = np.zeros(rows, dtype=np.int8)
        self.request_id = np.full(rows, -1, dtype=np.int64)
        self.rank = np.zeros(rows, dtype=np.int64)
        self.length = np.zeros(rows, dtype=np.int32)
        self.known = np.zeros(rows, dtype=np.int32)
        self.computed = np.zeros(rows, dtype=np.int32)
        self.taken = np.zeros(rows, dtype=np.int32)
        self.limit = np.zeros(rows, dtype=np.int32)
        self.num_blocks = np.zeros(rows, dtype=np.int32)
        self.last_step = np.full(rows, -1, dtype=np.int64)
        self.greedy = np.ones(rows, dtype=np.bool_)
        self.stop_line = np.zeros(rows, dtype=np.int32)
        self.featured = np.zeros(rows, dtype=np.bool_)
        self.stale = np.zeros(rows, dtype=np.bool_)
        self.masked = np.zeros(rows, dtype=np.bool_)
        self.processed = np.zeros(rows, dtype=np.bool_)
        self.logprobs = np.full(rows, -1, dtype=np.int8)
        self.scores = np.full(rows, -1, dtype=np.int8)
        self.stop_ids = np.full((rows, MIN_STOP_WIDTH), PLACEHOLDER, dtype=np.int32)
        # Zeroed pages are not touched before they are written, so unused context costs no memory.
        self.tokens = np.zeros((rows, max_length), dtype=np.int32)
        self.block_table = np.zeros((rows, columns), dtype=np.int32)

    def take(self, row: int, request: Request, tokens: Ints, computed: int) -> None:
        """Give a free row to a request whose known tokens are `tokens`, the first of them computed already."""
        size = tokens.size
        self.state[row] = RowState.RUNNING
        self.request_id[row] = request.request_id
        self.rank[row] = request.rank
        self.length[row] = self.known[row] = self.taken[row] = size
        self.computed[row] = computed
        self.limit[row] = request.max_length
        self.num_blocks[row] = 0
        self.last_step[row] = -1
        self.greedy[row] = request.params.greedy
        self.featured[row] = request.line.size > 0
        self.masked[row] = request.form is not None
        self.processed[row] = request.arguments.size > 0 and not np.isnan(request.arguments).all()
        self.logprobs[row] = -1 if request.params.logprobs is None else request.params.logprobs
        self.scores[row] = -1 if request.params.prompt_logprobs is None else request.params.prompt_logprobs
        self.tokens[row, :size] = tokens
        self._set_stop_ids(row, request)

    def add_blocks(self, row: int, ids: Ints) -> None:
        """Blocks behind those that the row has."""
        have = int(self.num_blocks[row])
        self.block_table[row, have : have + ids.size] = ids
        self.num_blocks[row] = have + ids.size

    def updates(self, row: int) -> Ints:
        """[3, U]: row, column and block of all its blocks."""
        count = int(self.num_blocks[row])
        columns = np.arange(count, dtype=np.int32)
        return np.stack((np.full_like(columns, row), columns, self.block_table[row, :count]))

    def clear(self, row: int) -> None:
        self.state[row] = RowState.FREE
        self.request_id[row] = -1
        self.length[row] = self.known[row] = self.computed[row] = self.num_blocks[row] = 0

    def _set_stop_ids(self, row: int, request: Request) -> None:
        width = self.stop_ids.shape[1]
        if request.stop_ids.size > width:
            wider = np.full((self.stop_ids.shape[0], request.stop_ids.size), PLACEHOLDER, dtype=np.int32)
            wider[:, :width] = self.stop_ids
            self.stop_ids = wider
        self.stop_ids[row] = PLACEHOLDER
        self.stop_ids[row, : request.stop_ids.size] = request.stop_ids


@dataclass(frozen=True, slots=True, eq=False)
class RowSet:
    """Rows that decode together, with what stays as it is while they do: plans of steady decode share it.

    It holds as long as a plan in flight has these `rows`, the same array: none of them can have been freed then.
    """

    rows: Ints
    request_ids: NDArray[np.int64]
    limits: Ints
    stop_ids: Ints
    stop_lines: Ints
    has_stop_strings: bool
    ones: Ints
    all_greedy: bool
    featured: bool
    masked: bool
    processed: bool
    logprobs: bool

    @classmethod
    def of(cls, table: RowTable, rows: Ints) -> Self:
        return cls(
            rows=rows,
            request_ids=table.request_id[rows],
            limits=table.limit[rows],
            stop_ids=table.stop_ids[rows],
            stop_lines=(lines := table.stop_line[rows]),
            has_stop_strings=bool(lines.any()),
            ones=np.ones_like(rows),
            all_greedy=bool(table.greedy[rows].all()),
            featured=bool(table.featured[rows].any()),
            masked=bool(table.masked[rows].any()),
            processed=bool(table.processed[rows].any()),
            logprobs=bool((table.logprobs[rows] >= 0).any()),
        )
