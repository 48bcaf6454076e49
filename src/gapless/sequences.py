"""Sequences from their arrival to their end, the rows and blocks they hold, and who may share what they computed.

Full blocks are registered when their step retires; whoever is admitted with the same beginning shares them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gapless.blocks import NULL_BLOCK, BlockPool
from gapless.config import SchedulerLimits
from gapless.errors import InternalError
from gapless.outcome import Finished
from gapless.prefix import extend_chain
from gapless.request import FinishReason, Request
from gapless.rows import RowState, RowTable
from gapless.stop_table import StopTable
from gapless.waiting import SequenceState, WaitingQueue

DIGESTS_PER_STEP = 2048  # of answers that have ended: about 2 ms
_EMPTY = np.zeros(0, dtype=np.int32)


@dataclass(slots=True)
class SchedulerStats:
    """Counts since the start.

    cached_tokens      prompt tokens whose KV was found in the prefix cache
    recomputed_tokens  tokens whose KV is computed once more, after a preemption or a failed step
    failed_steps       steps that ran out of memory
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    recomputed_tokens: int = 0
    overshoot_rows: int = 0
    preemptions: int = 0
    failed_steps: int = 0


class Sequences:
    """The lowest layer of the scheduler: who waits, who has a row, who drains, and who has ended.

    It owns these books and frees rows and blocks by retirement. planner.py advances what is scheduled, scheduler.py
    what is known.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks)
        self.rows = RowTable(limits.max_rows, limits.max_model_len, limits.block_columns)
        self.stats = SchedulerStats()
        self._sequences: dict[int, SequenceState] = {}
        self._waiting = WaitingQueue()
        self._held: dict[int, list[SequenceState]] = {}  # by the request whose prompt they wait for
        self._stop_table = StopTable()
        self._row_owner: list[SequenceState | None] = [None] * limits.max_rows
        self._free_rows = list(range(limits.max_rows - 1, -1, -1))
        self._draining: dict[int, None] = {}  # rows, as an ordered set
        self._finished: list[Finished] = []
        self._retired_step = -1
        self._rows_changed = False
        self._digests_left = DIGESTS_PER_STEP
        self._registers = limits.prefix_cache
        self._holds_back = 0
        self._kept_back: list[SequenceState] = []

    # ---------------- intake

    def add(self, request: Request) -> None:
        """Queue a request that was validated before."""
        if request.request_id in self._sequences:
            raise InternalError(f"request {request.request_id} was added twice")
        masks = None if request.form is None else request.form.start()
        sequence = SequenceState(request, request.prompt, digests=[*request.digests], masks=masks)
        self._sequences[request.request_id] = sequence
        self._registers |= len(request.digests) > 0  # of one of n
        leader = self._sequences.get(request.leader)
        if leader is None or self._has_prompt(leader):
            self._push(sequence)
        else:
            self._held.setdefault(request.leader, []).append(sequence)

    def cancel(self, request_id: int) -> bool:
        """End a request now, wherever it is. False if it has ended already."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._end_early(sequence, FinishReason.CANCELLED)
        return True

    def fail(self, request_id: int, error: str) -> None:
        """End a request that can not go on, and say why. Nothing happens if it has ended."""
        if (sequence := self._sequences.get(request_id)) is not None:
            self._end_early(sequence, FinishReason.ERROR, error)

    def _end_early(self, sequence: SequenceState, reason: FinishReason, error: str | None = None) -> None:
        held = self._held.get(sequence.request.leader, [])
        waits = sequence.row < 0 and sequence not in held
        if sequence in held:
            held.remove(sequence)
        self._finish(sequence, reason, error=error)
        if waits:
            self._waiting.one_ended(self._sequences)

    def preempt(self, request_id: int) -> bool:
        """Take the row and blocks of a running request; it goes on later, recomputed. False if it is not running."""
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.row < 0 or self.rows.state[sequence.row] != RowState.RUNNING:
            return False
        self._preempt(sequence.row)
        return True

    def take_finished(self) -> tuple[Finished, ...]:
        """Ends that have not been reported yet."""
        finished, self._finished = tuple(self._finished), []
        return finished

    # ---------------- counts

    @property
    def num_running(self) -> int:
        """Requests that have a row and have not ended."""
        used = self.limits.max_rows - len(self._free_rows)
        return used - sum(self.rows.state[row] == RowState.DEAD for row in self._draining)

    def census(self) -> tuple[int, int]:
        """Requests that run and that wait, as any thread may ask while steps go on: rows whose requests have ended and
        that a step in flight still holds count as running."""
        running = min(self.limits.max_rows - len(self._free_rows), len(self._sequences))
        return running, len(self._sequences) - running

    @property
    def queue_length(self) -> int:
        """Entries of the waiting queue, cancelled ones that have not been dropped yet included."""
        return len(self._waiting)

    def requests_without_row(self) -> set[int]:
        """Ids of the requests that wait, preempted ones included, and those not that wait for another's prompt. Cost
        grows with their number; for tests."""
        held = {sequence.request.request_id for each in self._held.values() for sequence in each}
        return {request_id for request_id, sequence in self._sequences.items() if sequence.row < 0} - held

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self._sequences) - self.num_running

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended yet or its row has not been freed."""
        return bool(self._sequences) or bool(self._draining)

    # ---------------- sharing

    def _has_prompt(self, leader: SequenceState) -> bool:
        """Whether those that share the prompt of this one will find it."""
        return leader.registered >= (leader.request.prompt.size - 1) // self.limits.block_size

    def _let_go(self, leader: SequenceState, *, anyway: bool = False) -> None:
        """Queue those that wait for the prompt of this one, if it is there."""
        if leader.request.request_id in self._held and (anyway or self._has_prompt(leader)):
            for sequence in self._held.pop(leader.request.request_id):
                if leader.cached >= 0:
                    self._waiting.push(sequence)  # begun with its leader
                else:
                    self._push(sequence)

    def _push(self, sequence: SequenceState) -> None:
        """Queue a sequence that has not begun."""
        if self._holds_back:
            self._kept_back.append(sequence)
        else:
            self._waiting.push(sequence)

    def _shared_part(self, row: int, blocks: int) -> int:
        """How many of the first `blocks` blocks of a row others may share: without a prefix cache those of n."""
        owner = self._row_owner[row]
        assert owner is not None
        return blocks if self.limits.prefix_cache else min(blocks, len(owner.request.digests))

    def _register(self, row: int, blocks: int) -> None:
        """Let the row's first `blocks` blocks be found. They are full, and the steps that filled them have retired."""
        sequence = self._row_owner[row]
        assert sequence is not None
        begin = sequence.registered
        if blocks > begin:
            salt = sequence.request.salt
            extend_chain(sequence.digests, self.rows.tokens[row], blocks, self.limits.block_size, salt)
            self.pool.register(self.rows.block_table[row, begin:blocks], sequence.digests[begin:blocks])
            sequence.registered = blocks
            self._let_go(sequence)

    def _register_answer(self, row: int) -> None:
        """Of a row that is freed: what it has sampled, and so has read, may be another's prompt.

        Not block by block along the way, which would cost every step. Where very many rows end at once, some are not
        registered: nobody is kept waiting for a cache.
        """
        known, sequence = int(self.rows.known[row]), self._row_owner[row]
        assert sequence is not None
        new = (known - 1) // self.limits.block_size - sequence.registered
        if known > self.rows.taken[row] and new > 0:
            new = min(new, self._digests_left)
            self._digests_left -= new
            self._register(row, sequence.registered + new)

    # ---------------- ends

    def _finish(
        self, sequence: SequenceState, reason: FinishReason, stop: int | None = None, error: str | None = None
    ) -> None:
        """Report the end. The row, if there is one, is freed by retirement."""
        request, row = sequence.request, sequence.row
        del self._sequences[request.request_id]
        known = int(self.rows.known[row]) if row >= 0 else sequence.tokens.size
        generated, cached = known - request.prompt.size, max(0, sequence.cached)
        self._finished.append(Finished(request.request_id, reason, generated, cached, stop, error))
        self._let_go(sequence, anyway=True)
        if row >= 0:
            self._drain(row, RowState.DEAD)

    def _preempt(self, row: int) -> None:
        self.stats.preemptions += 1
        self._drain(row, RowState.PREEMPTED)

    def _drain(self, row: int, state: int) -> None:
        """Run this row no more, and free it once no step in flight has it: at once if none has."""
        self.rows.state[row] = state
        self._rows_changed = True
        self._draining[row] = None
        if self.rows.last_step[row] <= self._retired_step:
            self._release(row)

    def _retire(self, step: int) -> None:
        if step != self._retired_step + 1:
            raise InternalError(f"step {step} was retired after step {self._retired_step}")
        self._retired_step = step
        for row in [row for row in self._draining if self.rows.last_step[row] <= step]:
            self._release(row)

    def _release(self, row: int) -> None:
        """Free a row and its blocks; a preempted sequence goes back to the queue with what is known."""
        table, sequence = self.rows, self._row_owner[row]
        assert sequence is not None
        if self.limits.prefix_cache:
            self._register_answer(row)
        if table.state[row] == RowState.PREEMPTED:
            sequence.tokens = table.tokens[row, : table.known[row]].copy()
            sequence.computed = int(min(table.computed[row], table.known[row]))
            self._waiting.push(sequence)
        elif table.state[row] != RowState.DEAD:
            raise InternalError(f"row {row} was freed before its sequence ended")
        sequence.row = -1
        self._stop_table.release(sequence.request.stops)
        del self._draining[row]
        self._row_owner[row] = None
        self.pool.release(table.block_table[row, : table.num_blocks[row]])
        table.clear(row)
        self._free_rows.append(row)

    # ---------------- checks

    def check_integrity(self) -> None:
        """Raise InternalError if the books do not agree. Cost grows with rows; for tests and idle moments."""
        table, bs = self.rows, self.limits.block_size
        used = [row for row, owner in enumerate(self._row_owner) if owner is not None]
        owned = [table.block_table[row, : table.num_blocks[row]] for row in used]
        self.pool.check_integrity(np.concatenate(owned) if owned else _EMPTY)
        if sorted(used + self._free_rows) != list(range(self.limits.max_rows)):
            raise InternalError("a row is neither free nor used, or both")
        if sorted(self._draining) != [r for r in used if table.state[r] != RowState.RUNNING]:
            raise InternalError("the draining rows differ from the rows that no longer run")
        for row in used:
            owner = self._row_owner[row]
            assert owner is not None
            in_flight = int(table.length[row] - table.known[row])
            if in_flight < 0 or (in_flight and table.last_step[row] <= self._retired_step):
                raise InternalError(f"row {row} has {in_flight} tokens in flight")
            if not table.computed[row] <= table.length[row] <= table.limit[row]:
                raise InternalError(f"row {row} was scheduled past its limit")
            if table.num_blocks[row] < -(-table.computed[row] // bs):
                raise InternalError(f"row {row} has fewer KV blocks than its computed tokens need")
            if NULL_BLOCK in table.block_table[row, : table.num_blocks[row]]:
                raise InternalError(f"row {row} holds the null block")
            if owner.row != row or table.request_id[row] != owner.request.request_id:
                raise InternalError(f"row {row} and its sequence disagree")
            if (table.state[row] == RowState.DEAD) == (owner.request.request_id in self._sequences):
                raise InternalError(f"row {row} outlived its request, or the other way round")
        if self._stop_table.num_lines > len(used):
            raise InternalError("stop strings of rows that are free are still looked for")
        if not self.has_work and (
            len(self._free_rows) != self.limits.max_rows or self.pool.num_free != self.pool.num_usable
        ):
            raise InternalError("nothing is left to do but rows or blocks are still held")
