"""The next step: which rows run, how many tokens each, and which blocks they gain. Nothing here looks at a token."""

from __future__ import annotations

import numpy as np

from gapless.budget import TokenBudget
from gapless.config import SchedulerLimits
from gapless.errors import InternalError
from gapless.plan import NO_PARAMS, PLACEHOLDER, Floats, Ints, Plan, RowLines, RowParams
from gapless.rows import RowSet, RowState
from gapless.scores import scores_of
from gapless.sequences import DIGESTS_PER_STEP, Sequences
from gapless.waiting import SequenceState

_EMPTY = np.zeros(0, dtype=np.int32)


class Planner(Sequences):
    """Advances the scheduled counts. Owns the lists of running rows and the budget of a step's tokens."""

    def __init__(self, limits: SchedulerLimits) -> None:
        super().__init__(limits)
        self.budget = TokenBudget(limits.max_batch_tokens, limits.max_model_len)
        self._next_step = 0
        self._decoding = self._prefilling = _EMPTY  # running rows, oldest first; rebuilt when a row changes state
        self._steady = RowSet.of(self.rows, _EMPTY)  # the same rows as _decoding
        self._continued: RowSet | None = None  # what the newest step ran, if that was all

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

    @property
    def num_prefilling(self) -> int:
        """Running rows whose prompt has not been launched to its end."""
        self._refresh_rows()
        return self._prefilling.size

    # ---------------- running rows

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

    def _grow(self, rows: Ints) -> Ints:
        """One more block for each of these rows."""
        ids = self.pool.allocate(rows.size)
        columns = self.rows.num_blocks[rows]
        self.rows.block_table[rows, columns] = ids
        self.rows.num_blocks[rows] = columns + 1
        return np.stack((rows, columns, ids))

    # ---------------- newcomers

    def _admit(self, budget: int) -> tuple[list[tuple[int, int]], list[Ints]]:
        """Take waiting requests while budget, rows and blocks last: (row, tokens) of each, and blocks gained."""
        admitted: list[tuple[int, int]] = []
        gained: list[Ints] = []
        reserve, updates = -1, self.limits.max_block_updates - self.limits.max_rows
        lines, skipped = self.limits.max_line_numbers, self.limits.max_model_len
        while budget > 0 and self._free_rows and (sequence := self._next_candidate()) is not None:
            # Every running row can still get its next block, or the newcomer would only be preempted again.
            reserve = self._count_growing() if reserve < 0 else reserve
            needed = self._blocks_for(sequence.tokens.size)
            found = self._find_shared(sequence, needed, self.pool.num_free - reserve)
            if found is None or needed > updates:
                break
            lines -= sequence.request.line.size
            skipped -= len(found) * self.limits.block_size if sequence.request.counts else 0
            if lines < 0 or skipped < 0:
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

    def _next_candidate(self) -> SequenceState | None:
        """The first in rank without a row. None while one that will go back to the queue drains."""
        if any(self.rows.state[row] == RowState.PREEMPTED for row in self._draining):
            return None
        return self._waiting.first(self._sequences)

    def _find_shared(self, sequence: SequenceState, needed: int, room: int) -> list[int] | None:
        """Blocks that hold the sequence's beginning, or None if `room` blocks are too few for the rest of `needed`.

        A last token at least is left to compute. Those that wait for room are looked at in every step, so this looks
        first, in a few look-ups, whether it can fit: shared blocks without an owner take room, too.
        """
        fed_from = sequence.tokens.size - 1
        if sequence.request.params.prompt_logprobs is not None:  # of what is not fed there are none
            fed_from = min(fed_from, sequence.scored)
        count = min(len(sequence.digests), fed_from // self.limits.block_size)
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
        self._let_go(sequence)
        return row

    def _blocks_for(self, length: int) -> int:
        return -(-length // self.limits.block_size)

    def _count_growing(self) -> int:
        """Running rows that will need another block; the last token of a sequence is never fed."""
        table = self.rows
        has_room_for = table.num_blocks * self.limits.block_size
        return int(np.count_nonzero((table.state == RowState.RUNNING) & (table.limit - 1 > has_room_for)))

    # ---------------- booking

    def _schedule(
        self, decode_rows: Ints, chunk_rows: list[int], chunk_counts: list[int], new_rows: list[int], grown: list[Ints]
    ) -> Plan:
        """Advance the scheduled counts and freeze the decisions."""
        if decode_rows is self._steady.rows and not chunk_rows:
            return self._schedule_steady(grown[0])
        self._continued = None
        table, step = self.rows, self._next_step
        rows, counts = decode_rows, np.ones_like(decode_rows)
        blocks, params, num_decodes, lines = grown[0], NO_PARAMS, rows.size, None
        if chunk_rows:
            single = np.asarray(chunk_counts) == 1
            order = np.argsort(~single, kind="stable")
            rows = np.concatenate((rows, np.asarray(chunk_rows, dtype=np.int32)[order]))
            counts = np.concatenate((counts, np.asarray(chunk_counts, dtype=np.int32)[order]))
            blocks = np.concatenate(grown, axis=1)
            params = RowParams.of({row: owner.request for row in new_rows if (owner := self._row_owner[row])})
            lines = self._lines_of(new_rows)
            num_decodes += int(single.sum())
            self._rows_changed = True
        starts = table.computed[rows]
        computed = starts + counts
        table.computed[rows] = computed
        lengths = table.length[rows]
        samples = (computed == lengths).astype(np.int32)
        sampling = rows if samples.all() else rows[samples > 0]
        scores = scores_of(table, self._row_owner, rows, starts, counts) if (table.scores[rows] >= 0).any() else None
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
            lines=lines,
            featured=bool(table.featured[rows].any()),
            masked=bool(table.masked[sampling].any()),
            processed=bool(table.processed[sampling].any()),
            logprobs=bool((table.logprobs[sampling] >= 0).any()),
            scores=scores,
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
            featured=steady.featured,
            masked=steady.masked,
            processed=steady.processed,
            logprobs=steady.logprobs,
            continues=continues,
        )

    def _lines_of(self, new_rows: list[int]) -> RowLines | None:
        """What to send of the features of rows that were taken, None if they have none and had none."""
        lines: dict[int, Ints] = {}
        skipped: dict[int, Ints] = {}
        arguments: dict[int, Floats] = {}
        for row in new_rows:
            owner = self._row_owner[row]
            assert owner is not None
            line = owner.request.line
            if line.size or self.rows.stale[row]:
                lines[row] = line
                self.rows.stale[row] = line.size > 0
            if owner.request.counts and (cached := int(self.rows.computed[row])):
                skipped[row] = self.rows.tokens[row, :cached].copy()
            arguments[row] = owner.request.arguments
        return RowLines.of(lines, skipped, {row: arguments[row] for row in lines}) if lines else None

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

    def _preempt_all(self) -> None:
        """Every unfinished sequence is to be recomputed from what is known."""
        states = self.rows.state
        for row in np.flatnonzero((states == RowState.RUNNING) | (states == RowState.ENDING)).tolist():
            self._drain(row, RowState.PREEMPTED)
        self._continued = None  # the device may not have seen the newest

    def check_integrity(self) -> None:
        """Raise InternalError if the books do not agree. Cost grows with rows; for tests and idle moments."""
        super().check_integrity()
        table = self.rows
        decoding = int(np.count_nonzero((table.state == RowState.RUNNING) & (table.length - table.computed == 1)))
        if not max(1, decoding) <= self.budget.tokens <= self.limits.max_batch_tokens:
            raise InternalError(f"a step may have {self.budget.tokens} tokens, and {decoding} rows decode")
