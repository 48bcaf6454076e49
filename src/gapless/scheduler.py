"""Which rows run in the next step, and what became of the last one. Knows lengths and blocks, no tensors.

Policy: first come, first served, but for priorities, which count as so many arrivals (request.py `Request.rank`).
Running rows decode first, oldest first; then prompts go on in chunks within the token budget; then waiting requests are
admitted. When KV blocks run out, the youngest running sequence is preempted: its blocks come back once its steps in
flight have retired, and it is recomputed from its known tokens later, before any request that ranks behind it. When a
step runs out of memory, that happens to all, and the budget shrinks if it is not the first of late.

Full blocks are registered when their step retires; whoever is admitted with the same beginning shares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gapless.blocks import NULL_BLOCK, BlockPool
from gapless.budget import TokenBudget
from gapless.config import SchedulerLimits
from gapless.errors import InternalError
from gapless.outcome import Committed, Finished
from gapless.plan import NO_PARAMS, PLACEHOLDER, Ints, Plan, RowParams
from gapless.prefix import extend_chain
from gapless.request import FinishReason, Request
from gapless.rows import RowSet, RowState, RowTable
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


class Scheduler:
    """Owns sequences, rows and both counts; alone changes them, on one thread."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks)
        self.rows = RowTable(limits.max_rows, limits.max_model_len, limits.block_columns)
        self.stats = SchedulerStats()
        self.budget = TokenBudget(limits.max_batch_tokens, limits.max_model_len)
        self._sequences: dict[int, SequenceState] = {}
        self._waiting = WaitingQueue()
        self._stop_table = StopTable()
        self._row_owner: list[SequenceState | None] = [None] * limits.max_rows
        self._free_rows = list(range(limits.max_rows - 1, -1, -1))
        self._draining: dict[int, None] = {}  # rows, as an ordered set
        self._finished: list[Finished] = []
        self._next_step = 0
        self._retired_step = -1
        self._decoding = self._prefilling = _EMPTY  # running rows, oldest first; rebuilt when a row changes state
        self._steady = RowSet.of(self.rows, _EMPTY)  # the same rows as _decoding
        self._continued: RowSet | None = None  # what the newest step ran, if that was all
        self._rows_changed = False
        self._digests_left = DIGESTS_PER_STEP

    # ---------------------------------------------------------------- intake

    def add(self, request: Request) -> None:
        """Queue a request that was validated before."""
        if request.request_id in self._sequences:
            raise InternalError(f"request {request.request_id} was added twice")
        sequence = SequenceState(request, request.prompt, digests=[*request.digests])
        self._sequences[request.request_id] = sequence
        self._waiting.push(sequence)

    def cancel(self, request_id: int) -> bool:
        """End a request now, wherever it is. False if it has ended already."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        waits = sequence.row < 0
        self._finish(sequence, FinishReason.CANCELLED)
        if waits:
            self._waiting.one_ended(self._sequences)
        return True

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
        self._digests_left = DIGESTS_PER_STEP
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
        while needed > self.pool.num_free + self._blocks_coming():
            running = np.concatenate((self._decoding, self._prefilling))
            if running.size <= 1:
                raise InternalError("the oldest sequence does not fit in the KV cache on its own")
            victim = int(running[np.argmax(table.rank[running])])
            if table.length[victim] - table.computed[victim] == 1:
                needed -= int(table.computed[victim] == table.num_blocks[victim] * self.limits.block_size)
            self._preempt(victim)
            self._refresh_rows()

    def _blocks_coming(self) -> int:
        """Blocks that are free once the rows that drain have retired: those that no other row has."""
        table = self.rows
        held = [table.block_table[row, : table.num_blocks[row]] for row in self._draining]
        return self.pool.count_freed(np.concatenate(held)) if held else 0

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
        reserve, updates = -1, self.limits.max_block_updates - self.limits.max_rows
        while budget > 0 and self._free_rows and (sequence := self._next_candidate()) is not None:
            # Every running row can still get its next block, or the newcomer would only be preempted again.
            reserve = self._count_growing() if reserve < 0 else reserve
            needed = self._blocks_for(sequence.tokens.size)
            found = self._find_shared(sequence, needed, self.pool.num_free - reserve)
            if found is None or needed > updates:
                break
            reserve += self._blocks_for(sequence.request.max_length - 1) > needed
            updates -= needed
            self._waiting.pop()
            row = self._take_row(sequence, found)
            gained.append(self.rows.updates(row))
            count = min(budget, int(self.rows.length[row] - self.rows.computed[row]))
            admitted.append((row, count))
            budget -= count
        return admitted, gained

    def _find_shared(self, sequence: SequenceState, needed: int, room: int) -> list[int] | None:
        """Blocks that hold the sequence's beginning, or None if `room` blocks are too few for the rest of `needed`.

        A last token at least is left to compute. Those that wait for room are looked at in every step, so this looks
        first, in a few look-ups, whether it can fit: shared blocks without an owner take room, too.
        """
        count = min(len(sequence.digests), (sequence.tokens.size - 1) // self.limits.block_size)
        if needed - self.pool.estimate_owned(sequence.digests, count) > room:
            return None
        found = self.pool.find(sequence.digests[:count])
        taken = needed - len(found) + self.pool.count_idle(found)
        return found if taken <= room else None

    def _take_row(self, sequence: SequenceState, shared: list[int]) -> int:
        """Give a sequence a row, with these blocks and new ones for the rest of its tokens."""
        row = sequence.row = self._free_rows.pop()
        self._row_owner[row] = sequence
        cached = len(shared) * self.limits.block_size
        if sequence.cached < 0:
            sequence.cached = cached
            self.stats.prompt_tokens += sequence.tokens.size
            self.stats.cached_tokens += cached
        self.stats.recomputed_tokens += max(0, sequence.computed - cached)
        sequence.registered = len(shared)
        ids = self.pool.share(shared)
        self.rows.take(row, sequence.request, sequence.tokens, cached)
        self.rows.stop_line[row] = self._stop_table.take(sequence.request.stops)
        new = self.pool.allocate(self._blocks_for(sequence.tokens.size) - ids.size)
        self.rows.add_blocks(row, np.concatenate((ids, new)))
        sequence.tokens = _EMPTY
        self._rows_changed = True
        return row

    def _blocks_for(self, length: int) -> int:
        return -(-length // self.limits.block_size)

    def _count_growing(self) -> int:
        """Running rows that will need another block; the last token of a sequence is never fed."""
        table = self.rows
        has_room_for = table.num_blocks * self.limits.block_size
        return int(np.count_nonzero((table.state == RowState.RUNNING) & (table.limit - 1 > has_room_for)))

    def _next_candidate(self) -> SequenceState | None:
        """The first in rank without a row. None while one that will go back to the queue drains."""
        if any(self.rows.state[row] == RowState.PREEMPTED for row in self._draining):
            return None
        return self._waiting.first(self._sequences)

    def _grow(self, rows: Ints) -> Ints:
        """One more block for each of these rows."""
        ids = self.pool.allocate(rows.size)
        columns = self.rows.num_blocks[rows]
        self.rows.block_table[rows, columns] = ids
        self.rows.num_blocks[rows] = columns + 1
        return np.stack((rows, columns, ids))

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
            running = running[np.argsort(table.rank[running])]
            pending = table.length[running] - table.computed[running]
            self._decoding, self._prefilling = running[pending == 1], running[pending > 1]
            self._steady = RowSet.of(table, self._decoding)
            self._rows_changed = False

    # ---------------------------------------------------------------- commit

    def commit(self, plan: Plan, sampled: Ints) -> Committed:
        """Book the tokens of the oldest step in flight and retire it. `sampled` int32[num_samples], entry order."""
        table = self.rows
        if self.limits.prefix_cache and plan.num_decodes < plan.rows_E.size:
            self._register_chunks(plan)
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
        completed = self._complete_strings(these, rows, sampled) if these.has_stop_strings else {}
        if stops.any() or ended.any() or completed:
            stopped = stops.any(axis=1)
            ended[list(completed)] = True
            for index in np.flatnonzero(stopped | ended).tolist():
                owner = self._row_owner[rows[index]]
                assert owner is not None
                stop = completed.get(index)
                by_length = not stopped[index] and stop is None
                self._finish(owner, FinishReason.LENGTH if by_length else FinishReason.STOP, stop)
        self.stats.generated_tokens += rows.size
        self.budget.step_succeeded()
        self._retire(plan.step)
        return Committed(these.request_ids, sampled, self.take_finished())

    def _complete_strings(self, these: RowSet, rows: Ints, sampled: Ints) -> dict[int, int]:
        """Entries whose newest token completes a stop string, and which. Python looks at the few that may."""
        found: dict[int, int] = {}
        for index in self._stop_table.hits(these.stop_lines, sampled):
            row = int(rows[index])
            owner = self._row_owner[row]
            assert owner is not None
            assert owner.request.stops is not None
            answer = self.rows.tokens[row, owner.request.prompt.size : self.rows.known[row]]
            stop = owner.request.stops.completes(answer)
            if stop is not None:
                found[index] = stop
        return found

    def _register_chunks(self, plan: Plan) -> None:
        chunks = slice(plan.num_decodes, None)
        rows, ends = plan.rows_E[chunks], plan.starts_E[chunks] + plan.counts_E[chunks]
        for row, blocks in zip(rows.tolist(), (ends // self.limits.block_size).tolist(), strict=True):
            if self.rows.state[row] != RowState.DEAD:
                self._register(row, blocks)

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

    def abandon(self, failed: Plan, skipped: Sequence[Plan]) -> Committed:
        """Retire all steps in flight without tokens: the oldest ran out of memory, and the others were skipped.

        Every unfinished sequence is recomputed from what is known, not only those of the failed step: so the budget,
        which may shrink, holds for the rows that decode, too, since they are admitted within it. TokenBudget says why
        this comes to an end.
        """
        for row in np.flatnonzero(
            (self.rows.state == RowState.RUNNING) | (self.rows.state == RowState.ENDING)
        ).tolist():
            self._drain(row, RowState.PREEMPTED)
        self._continued = None  # the device has not seen the skipped ones
        for plan in (failed, *skipped):
            self._retire(plan.step)
        self.stats.failed_steps += 1
        self.budget.step_failed(failed.num_tokens)
        return Committed.without_tokens(self.take_finished())

    def _finish(self, sequence: SequenceState, reason: FinishReason, stop: int | None = None) -> None:
        """Report the end. The row, if there is one, is freed by retirement."""
        request, row = sequence.request, sequence.row
        del self._sequences[request.request_id]
        known = int(self.rows.known[row]) if row >= 0 else sequence.tokens.size
        generated, cached = known - request.prompt.size, max(0, sequence.cached)
        self._finished.append(Finished(request.request_id, reason, generated, cached, stop))
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
        if self._stop_table.num_lines > len(used):
            raise InternalError("stop strings of rows that are free are still looked for")
        if not self.has_work and (
            len(self._free_rows) != self.limits.max_rows or self.pool.num_free != self.pool.num_usable
        ):
            raise InternalError("nothing is left to do but rows or blocks are still held")
