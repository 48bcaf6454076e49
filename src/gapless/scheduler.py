"""Which rows run in the next step, and what became of the last one. Knows lengths and blocks, no tensors.

Policy: first come, first served. Running rows decode first, oldest first; then prompts go on in chunks within the
token budget; then waiting requests are admitted. When KV blocks run out, the youngest running sequence is preempted:
its blocks come back once its steps in flight have retired, and it is recomputed from its known tokens later, before
any request that arrived after it. When a step runs out of memory, that happens to all, and the budget shrinks if it is
not the first of late.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gapless.blocks import NULL_BLOCK, BlockPool
from gapless.budget import TokenBudget
from gapless.config import SchedulerLimits
from gapless.errors import InternalError
from gapless.outcome import Committed, Finished
from gapless.plan import NO_PARAMS, PLACEHOLDER, Ints, Plan, RowParams
from gapless.request import FinishReason, Request
from gapless.rows import RowSet, RowState, RowTable

_EMPTY = np.zeros(0, dtype=np.int32)

MANY_CANCELLED = 64  # fewer cancelled requests in the queue are not worth rebuilding it


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request between arrival and its end. `tokens` holds the known ones while it has no row."""

    request: Request
    tokens: Ints
    row: int = -1


@dataclass(slots=True)
class SchedulerStats:
    """Counts since the start.

    recomputed_tokens  tokens whose KV was computed and thrown away, by preemption or with a failed step
    failed_steps       steps that ran out of memory
    """

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    recomputed_tokens: int = 0
    overshoot_rows: int = 0
    preemptions: int = 0
    failed_steps: int = 0


class Scheduler:
    """Owns sequences, rows and both counts; alone changes them, on one thread."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks)
        self.rows = RowTable(limits.max_rows, limits.max_model_len, limits.block_columns)
        self.stats = SchedulerStats()
        self.budget = TokenBudget(limits.max_batch_tokens, limits.max_model_len)
        self._sequences: dict[int, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._cancelled_waiting = 0
        self._preempted: list[tuple[int, _Sequence]] = []  # heap, oldest first
        self._row_owner: list[_Sequence | None] = [None] * limits.max_rows
        self._free_rows = list(range(limits.max_rows - 1, -1, -1))
        self._draining: dict[int, None] = {}  # rows, as an ordered set
        self._finished: list[Finished] = []
        self._next_step = 0
        self._retired_step = -1
        self._decoding = self._prefilling = _EMPTY  # running rows, oldest first; rebuilt when a row changes state
        self._steady = RowSet.of(self.rows, _EMPTY)  # the same rows as _decoding
        self._continued: RowSet | None = None  # what the newest step ran, if that was all
        self._rows_changed = False

    # ---------------------------------------------------------------- intake

    def add(self, request: Request) -> None:
        """Queue a request that was validated before."""
        if request.request_id in self._sequences:
            raise InternalError(f"request {request.request_id} was added twice")
        sequence = _Sequence(request, request.prompt)
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)

    def cancel(self, request_id: int) -> bool:
        """End a request now, wherever it is. False if it has ended already."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        waits = sequence.row < 0
        self._finish(sequence, FinishReason.CANCELLED)
        if waits:
            self._forget_cancelled()
        return True

    def _forget_cancelled(self) -> None:
        """Drop cancelled requests from the queue once they are the larger part of it; until then they are skipped."""
        self._cancelled_waiting += 1
        if self._cancelled_waiting > MANY_CANCELLED and 2 * self._cancelled_waiting > len(self._waiting):
            self._waiting = deque(each for each in self._waiting if each.request.request_id in self._sequences)
            self._cancelled_waiting = 0

    def preempt(self, request_id: int) -> bool:
        """Take the row and blocks of a running request; it goes on later, recomputed. False if it is not running."""
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.row < 0 or self.rows.state[sequence.row] != RowState.RUNNING:
            return False
        self._preempt(sequence.row)
        return True

    @property
    def num_running(self) -> int:
        """Requests that have a row and have not ended."""
        used = self.limits.max_rows - len(self._free_rows)
        return used - sum(self.rows.state[row] == RowState.DEAD for row in self._draining)

    @property
    def queue_length(self) -> int:
        """Entries of the waiting queue, cancelled ones that have not been dropped yet included."""
        return len(self._waiting)

    def requests_without_row(self) -> set[int]:
        """Ids of the requests that wait, preempted ones included. Cost grows with their number; for tests."""
        return {request_id for request_id, sequence in self._sequences.items() if sequence.row < 0}

    @property
    def num_prefilling(self) -> int:
        """Running rows whose prompt has not been launched to its end."""
        self._refresh_rows()
        return self._prefilling.size

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self._sequences) - self.num_running

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended yet or its row has not been freed."""
        return bool(self._sequences) or bool(self._draining)

    def take_finished(self) -> tuple[Finished, ...]:
        """Ends that have not been reported yet."""
        finished, self._finished = tuple(self._finished), []
        return finished

    # ---------------------------------------------------------------- plan

    def plan(self) -> Plan | None:
        """Decide the next step and count it as scheduled. None if no row can run before another step retires."""
        self._refresh_rows()
        decode_rows, blocks = self._plan_decodes()
        budget = self.budget.tokens - self._decoding.size  # with those that sit out, so that all can decode at once
        chunk_rows, chunk_counts = self._plan_chunks(budget)
        admitted, grown = self._admit(budget - sum(chunk_counts))
        chunk_rows += [row for row, _ in admitted]
        chunk_counts += [count for _, count in admitted]
        if not decode_rows.size and not chunk_rows:
            return None
        return self._schedule(decode_rows, chunk_rows, chunk_counts, [row for row, _ in admitted], [blocks, *grown])

    def _plan_decodes(self) -> tuple[Ints, Ints]:
        """Rows that decode one token, and [3, U] the (row, column, block) that they gain."""
        rows, table = self._decoding, self.rows
        wants = table.computed[rows] == table.num_blocks[rows] * self.limits.block_size
        needed = int(np.count_nonzero(wants))
        if not needed:
            return rows, np.zeros((3, 0), dtype=np.int32)
        if needed > self.pool.num_free:
            self._preempt_for(needed)
            rows = self._decoding
            wants = table.computed[rows] == table.num_blocks[rows] * self.limits.block_size
            stalled = np.flatnonzero(wants)[self.pool.num_free :]  # the youngest wait until blocks have retired
            rows, wants = np.delete(rows, stalled), np.delete(wants, stalled)
        return rows, self._grow(rows[wants])

    def _preempt_for(self, needed: int) -> None:
        """Preempt youngest first until the blocks that are free, or come back by retirement, cover the need."""
        table = self.rows
        coming = int(table.num_blocks[list(self._draining)].sum()) if self._draining else 0
        while needed > self.pool.num_free + coming:
            running = np.concatenate((self._decoding, self._prefilling))
            if running.size <= 1:
                raise InternalError("the oldest sequence does not fit in the KV cache on its own")
            victim = int(running[np.argmax(table.request_id[running])])
            had_free = self.pool.num_free
            if table.length[victim] - table.computed[victim] == 1:
                needed -= int(table.computed[victim] == table.num_blocks[victim] * self.limits.block_size)
            held = int(table.num_blocks[victim])
            self._preempt(victim)
            coming += held if self.pool.num_free == had_free else 0
            self._refresh_rows()

    def _plan_chunks(self, budget: int) -> tuple[list[int], list[int]]:
        """The next chunk of each prompt that has been admitted earlier."""
        rows: list[int] = []
        counts: list[int] = []
        for row in self._prefilling.tolist():
            if budget <= 0:
                break
            count = min(budget, int(self.rows.length[row] - self.rows.computed[row]))
            rows.append(row)
            counts.append(count)
            budget -= count
        return rows, counts

    def _admit(self, budget: int) -> tuple[list[tuple[int, int]], list[Ints]]:
        """Take waiting requests while budget, rows and blocks last: (row, tokens) of each, and blocks gained."""
        admitted: list[tuple[int, int]] = []
        gained: list[Ints] = []
        reserve = -1
        while budget > 0 and self._free_rows and (sequence := self._next_candidate()) is not None:
            # Every running row can still get its next block, or the newcomer would only be preempted again.
            reserve = self._count_growing() if reserve < 0 else reserve
            needed = self._blocks_for(sequence.tokens.size)
            if needed + reserve > self.pool.num_free:
                break
            reserve += self._blocks_for(sequence.request.max_length - 1) > needed
            self._pop_candidate(sequence)
            self.stats.prompt_tokens += sequence.tokens.size if sequence.tokens is sequence.request.prompt else 0
            row = sequence.row = self._free_rows.pop()
            self._row_owner[row] = sequence
            self.rows.take(row, sequence.request, sequence.tokens)
            gained.append(self._grow_to(row, sequence.tokens.size))
            sequence.tokens = _EMPTY
            self._rows_changed = True
            count = min(budget, int(self.rows.length[row]))
            admitted.append((row, count))
            budget -= count
        return admitted, gained

    def _blocks_for(self, length: int) -> int:
        return -(-length // self.limits.block_size)

    def _count_growing(self) -> int:
        """Running rows that will need another block; the last token of a sequence is never fed."""
        table = self.rows
        has_room_for = table.num_blocks * self.limits.block_size
        return int(np.count_nonzero((table.state == RowState.RUNNING) & (table.limit - 1 > has_room_for)))

    def _next_candidate(self) -> _Sequence | None:
        """The oldest sequence without a row. None while one that will go back to the queue, and is older, drains."""
        if any(self.rows.state[row] == RowState.PREEMPTED for row in self._draining):
            return None
        while self._preempted and self._preempted[0][0] not in self._sequences:
            heapq.heappop(self._preempted)
        if self._preempted:
            return self._preempted[0][1]
        while self._waiting and self._waiting[0].request.request_id not in self._sequences:
            self._waiting.popleft()
        return self._waiting[0] if self._waiting else None

    def _pop_candidate(self, sequence: _Sequence) -> None:
        if self._preempted and self._preempted[0][1] is sequence:
            heapq.heappop(self._preempted)
        else:
            self._waiting.popleft()

    def _grow(self, rows: Ints) -> Ints:
        """One more block for each of these rows."""
        ids = self.pool.allocate(rows.size)
        columns = self.rows.num_blocks[rows]
        self.rows.block_table[rows, columns] = ids
        self.rows.num_blocks[rows] = columns + 1
        return np.stack((rows, columns, ids))

    def _grow_to(self, row: int, length: int) -> Ints:
        """Blocks of one row for its first `length` positions."""
        have = int(self.rows.num_blocks[row])
        ids = self.pool.allocate(self._blocks_for(length) - have)
        columns = np.arange(have, have + ids.size, dtype=np.int32)
        self.rows.block_table[row, columns] = ids
        self.rows.num_blocks[row] = have + ids.size
        return np.stack((np.full_like(ids, row), columns, ids))

    def _schedule(
        self, decode_rows: Ints, chunk_rows: list[int], chunk_counts: list[int], new_rows: list[int], grown: list[Ints]
    ) -> Plan:
        """Advance the scheduled counts and freeze the decisions."""
        if decode_rows is self._steady.rows and not chunk_rows:
            return self._schedule_steady(grown[0])
        self._continued = None
        table, step = self.rows, self._next_step
        rows, counts = decode_rows, np.ones_like(decode_rows)
        blocks, params, num_decodes = grown[0], NO_PARAMS, rows.size
        if chunk_rows:
            single = np.asarray(chunk_counts) == 1
            order = np.argsort(~single, kind="stable")
            rows = np.concatenate((rows, np.asarray(chunk_rows, dtype=np.int32)[order]))
            counts = np.concatenate((counts, np.asarray(chunk_counts, dtype=np.int32)[order]))
            blocks = np.concatenate(grown, axis=1)
            params = RowParams.of({row: owner.request for row in new_rows if (owner := self._row_owner[row])})
            num_decodes += int(single.sum())
            self._rows_changed = True
        starts = table.computed[rows]
        computed = starts + counts
        table.computed[rows] = computed
        lengths = table.length[rows]
        samples = (computed == lengths).astype(np.int32)
        sampling = rows if samples.all() else rows[samples > 0]
        lengths = table.length[sampling]
        table.tokens[sampling, lengths] = PLACEHOLDER
        table.length[sampling] = lengths + 1
        table.last_step[rows] = step
        self._count_step(sampling[lengths + 1 >= table.limit[sampling]])
        return Plan(
            step=step,
            rows_E=rows,
            starts_E=starts,
            counts_E=counts,
            samples_E=samples,
            num_samples=sampling.size,
            num_decodes=num_decodes,
            num_tokens=int(counts.sum()),
            block_rows_U=blocks[0],
            block_columns_U=blocks[1],
            block_ids_U=blocks[2],
            params=params,
            all_greedy=bool(table.greedy[rows].all()),
        )

    def _schedule_steady(self, blocks: Ints) -> Plan:
        """_schedule for the running rows that decode, and no others: the common case, in fewer calls."""
        table, step, steady = self.rows, self._next_step, self._steady
        rows = steady.rows
        continues, self._continued = steady is self._continued, steady
        starts = table.computed[rows]
        lengths = starts + 1  # what decodes has one token left to compute
        after = lengths + 1
        table.computed[rows] = lengths
        table.tokens[rows, lengths] = PLACEHOLDER
        table.length[rows] = after
        table.last_step[rows] = step
        self._count_step(rows[after >= steady.limits])
        return Plan(
            step=step,
            rows_E=rows,
            starts_E=starts,
            counts_E=steady.ones,
            samples_E=steady.ones,
            num_samples=rows.size,
            num_decodes=rows.size,
            num_tokens=rows.size,
            block_rows_U=blocks[0],
            block_columns_U=blocks[1],
            block_ids_U=blocks[2],
            params=NO_PARAMS,
            all_greedy=steady.all_greedy,
            continues=continues,
        )

    def _count_step(self, ending: Ints) -> None:
        """Book a scheduled step; these rows have their last token with it."""
        if ending.size:
            self.rows.state[ending] = RowState.ENDING
            self._draining.update(dict.fromkeys(ending.tolist()))
            self._rows_changed = True
        self._next_step += 1
        self.stats.steps += 1

    def _refresh_rows(self) -> None:
        """Rebuild the lists of running rows, oldest first, if one has changed state."""
        if self._rows_changed:
            table = self.rows
            running = np.flatnonzero(table.state == RowState.RUNNING).astype(np.int32)
            running = running[np.argsort(table.request_id[running])]
            pending = table.length[running] - table.computed[running]
            self._decoding, self._prefilling = running[pending == 1], running[pending > 1]
            self._steady = RowSet.of(table, self._decoding)
            self._rows_changed = False

    # ---------------------------------------------------------------- commit

    def commit(self, plan: Plan, sampled: Ints) -> Committed:
        """Book the tokens of the oldest step in flight and retire it. `sampled` int32[num_samples], entry order."""
        table = self.rows
        rows = plan.rows_E if plan.num_samples == plan.rows_E.size else plan.rows_E[plan.samples_E > 0]
        if self._draining and not (live := table.state[rows] != RowState.DEAD).all():
            self.stats.overshoot_rows += int(live.size - live.sum())
            rows, sampled = rows[live], sampled[live]
        these = self._steady if rows is self._steady.rows else RowSet.of(table, rows)
        known = table.known[rows]
        after = known + 1
        table.tokens[rows, known] = sampled
        table.known[rows] = after
        stops = these.stop_ids == sampled[:, None]
        ended = after >= these.limits
        if stops.any() or ended.any():
            stopped = stops.any(axis=1)
            for index in np.flatnonzero(stopped | ended).tolist():
                owner = self._row_owner[rows[index]]
                assert owner is not None
                self._finish(owner, FinishReason.STOP if stopped[index] else FinishReason.LENGTH)
        self.stats.generated_tokens += rows.size
        self.budget.step_succeeded()
        self._retire(plan.step)
        return Committed(these.request_ids, sampled, self.take_finished())

    def abandon(self, failed: Plan, skipped: Sequence[Plan]) -> Committed:
        """Retire all steps in flight without tokens: the oldest ran out of memory, and the others were skipped.

        Every unfinished sequence is recomputed from what is known, not only those of the failed step: so the budget,
        which may shrink, holds for the rows that decode, too, since they are admitted within it. TokenBudget says why
        this comes to an end.
        """
        for row in np.flatnonzero(
            (self.rows.state == RowState.RUNNING) | (self.rows.state == RowState.ENDING)
        ).tolist():
            self.stats.recomputed_tokens += int(self.rows.computed[row])
            self._drain(row, RowState.PREEMPTED)
        self._continued = None  # the device has not seen the skipped ones
        for plan in (failed, *skipped):
            self._retire(plan.step)
        self.stats.failed_steps += 1
        self.budget.step_failed(failed.num_tokens)
        return Committed.without_tokens(self.take_finished())

    def _finish(self, sequence: _Sequence, reason: FinishReason) -> None:
        """Report the end. The row, if there is one, is freed by retirement."""
        request, row = sequence.request, sequence.row
        del self._sequences[request.request_id]
        known = int(self.rows.known[row]) if row >= 0 else sequence.tokens.size
        self._finished.append(Finished(request.request_id, reason, known - request.prompt.size))
        if row >= 0:
            self._drain(row, RowState.DEAD)

    def _preempt(self, row: int) -> None:
        self.stats.preemptions += 1
        self.stats.recomputed_tokens += int(self.rows.computed[row])
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
        if table.state[row] == RowState.PREEMPTED:
            sequence.tokens = table.tokens[row, : table.known[row]].copy()
            heapq.heappush(self._preempted, (sequence.request.request_id, sequence))
        elif table.state[row] != RowState.DEAD:
            raise InternalError(f"row {row} was freed before its sequence ended")
        sequence.row = -1
        del self._draining[row]
        self._row_owner[row] = None
        self.pool.release(table.block_table[row, : table.num_blocks[row]])
        table.clear(row)
        self._free_rows.append(row)

    # ---------------------------------------------------------------- checks

    def check_integrity(self) -> None:
        """Raise InternalError if the books do not agree. Cost grows with rows; for tests and idle moments."""
        table, bs = self.rows, self.limits.block_size
        decoding = int(np.count_nonzero((table.state == RowState.RUNNING) & (table.length - table.computed == 1)))
        if not max(1, decoding) <= self.budget.tokens <= self.limits.max_batch_tokens:
            raise InternalError(f"a step may have {self.budget.tokens} tokens, and {decoding} rows decode")
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
        if not self.has_work and (
            len(self._free_rows) != self.limits.max_rows or self.pool.num_free != self.pool.num_usable
        ):
            raise InternalError("nothing is left to do but rows or blocks are still held")
