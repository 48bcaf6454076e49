"""Which rows run in the next step, and what became of the last one. Knows lengths and blocks, no tensors.

Policy: first come, first served, but for priorities, which count as so many arrivals (request.py `Request.rank`).
Running rows decode first, oldest first; then prompts go on in chunks within the token budget; then waiting requests are
admitted. When KV blocks run out, the youngest running sequence is preempted: its blocks come back once its steps in
flight have retired, and it is recomputed from its known tokens later, before any request that ranks behind it. When a
step runs out of memory, that happens to all, and the budget shrinks if it is not the first of late.

Three layers, each on the one before: sequences.py who is there and what each holds, planner.py what is launched, and
here what is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gapless.config import SchedulerLimits
from gapless.outcome import Committed, Sampled
from gapless.plan import Ints, Plan
from gapless.planner import Planner
from gapless.request import FinishReason, TokenMasks
from gapless.rows import RowSet, RowState
from gapless.scores import book_scores
from gapless.sequences import SchedulerStats
from gapless.waiting import SequenceState

__all__ = ["Scheduler", "SchedulerStats"]


class Scheduler(Planner):
    """Owns sequences, rows and both counts; alone changes them, on one thread."""

    def __init__(self, limits: SchedulerLimits) -> None:
        super().__init__(limits)
        self._accepted: list[tuple[TokenMasks, int]] = []

    def commit(self, plan: Plan, sampled: Sampled) -> Committed:
        """Book what the oldest step in flight brought, in the order of its entries, and retire it."""
        table, tokens, logprobs = self.rows, sampled.tokens, sampled.logprobs
        if self._registers and (self._held or plan.num_decodes < plan.rows_E.size):
            self._register_chunks(plan)
        rows = plan.rows_E if plan.num_samples == plan.rows_E.size else plan.rows_E[plan.samples_E > 0]
        if self._draining and not (live := table.state[rows] != RowState.DEAD).all():
            self.stats.overshoot_rows += int(live.size - live.sum())
            rows, tokens = rows[live], tokens[live]
            logprobs = None if logprobs is None else logprobs.at(live)
        prompts = () if plan.scores is None else book_scores(self._sequences, plan.scores, sampled.scores)
        these = self._steady if rows is self._steady.rows else RowSet.of(table, rows)
        known = table.known[rows]
        after = known + 1
        table.tokens[rows, known] = tokens
        table.known[rows] = after
        stops = these.stop_ids == tokens[:, None]
        ended = after >= these.limits
        completed = self._complete_strings(these, rows, tokens) if these.has_stop_strings else {}
        if stops.any() or ended.any() or completed:
            stopped = stops.any(axis=1)
            ended = ended | stopped
            ended[list(completed)] = True
            for index in np.flatnonzero(ended).tolist():
                owner = self._row_owner[rows[index]]
                assert owner is not None
                stop = completed.get(index)
                by_length = not stopped[index] and stop is None
                self._finish(owner, FinishReason.LENGTH if by_length else FinishReason.STOP, stop)
        if these.masked:
            self._accept(rows, tokens, ended)
        self.stats.generated_tokens += rows.size
        self.budget.step_succeeded()
        self._retire(plan.step)
        return Committed(these.request_ids, tokens, self.take_finished(), logprobs, prompts)

    def _accept(self, rows: Ints, tokens: Ints, ended: NDArray[np.bool_]) -> None:
        """Keep what the forms of answers that go on have to be told."""
        for index in np.flatnonzero(self.rows.masked[rows] & ~ended).tolist():
            owner = self._row_owner[rows[index]]
            assert owner is not None
            assert owner.masks is not None
            self._accepted.append((owner.masks, int(tokens[index])))

    def take_accepted(self) -> list[tuple[TokenMasks, int]]:
        """Tokens of answers that must have a form, in order, that became known since the last call."""
        accepted, self._accepted = self._accepted, []
        return accepted

    def masks_of(self, plan: Plan) -> list[tuple[int, int, TokenMasks]]:
        """The sampling entries that need a mask: place among these, request, and what makes the mask.

        Of a step whose steps before have all been committed, or some tokens that the masks depend on are missing.
        """
        rows = plan.rows_E[plan.samples_E > 0]
        needs = self.rows.masked[rows] & (self.rows.state[rows] != RowState.DEAD)
        found: list[tuple[int, int, TokenMasks]] = []
        for place in np.flatnonzero(needs).tolist():
            owner = self._row_owner[rows[place]]
            assert owner is not None
            assert owner.masks is not None
            found.append((place, owner.request.request_id, owner.masks))
        return found

    def _complete_strings(self, these: RowSet, rows: Ints, sampled: Ints) -> dict[int, int]:
        """Entries whose newest token completes a stop string, and which. Python looks at the few that may."""
        found: dict[int, int] = {}
        for index in self._stop_table.hits(these.stop_lines, sampled):
            row = int(rows[index])
            owner = self._row_owner[row]
            assert owner is not None
            assert owner.request.stops is not None
            answer = self.rows.tokens[row, owner.request.prompt.size : self.rows.known[row]]
            if answer.size < owner.request.params.min_tokens:
                continue
            stop = owner.request.stops.completes(answer)
            if stop is not None:
                found[index] = stop
        return found

    def _register_chunks(self, plan: Plan) -> None:
        chunks = slice(0 if self._held else plan.num_decodes, None)  # the one token of a chunk may be awaited
        rows, ends = plan.rows_E[chunks], plan.starts_E[chunks] + plan.counts_E[chunks]
        for row, blocks in zip(rows.tolist(), (ends // self.limits.block_size).tolist(), strict=True):
            if self.rows.state[row] != RowState.DEAD:
                self._register(row, self._shared_part(row, blocks))

    def abandon(self, failed: Plan, skipped: Sequence[Plan]) -> Committed:
        """Retire all steps in flight without tokens: the oldest ran out of memory, and the others were skipped.

        Every unfinished sequence is recomputed from what is known, not only those of the failed step: so the budget,
        which may shrink, holds for the rows that decode, too, since they are admitted within it. TokenBudget says why
        this comes to an end.
        """
        self._preempt_all()
        for plan in (failed, *skipped):
            if plan.lines is not None:
                self.rows.stale[plan.lines.rows_A] = True  # for all that the device knows
            self._retire(plan.step)
        self.stats.failed_steps += 1
        self.budget.step_failed(failed.num_tokens)
        return Committed.without_tokens(self.take_finished())

    # ---------------- between steps

    def hold_back(self) -> None:
        """Let no request begin before let_begin(): those that have begun go on to their ends, and so do those that
        share the prompt of one of them. Each call needs its own let_begin()."""
        self._kept_back += self._waiting.keep(self._has_begun)
        self._holds_back += 1

    def _has_begun(self, sequence: SequenceState) -> bool:
        """It, or the one whose prompt it shares, has had a row. Who was left by that one counts as begun."""
        leader = self._sequences.get(sequence.request.leader)
        shares = sequence.request.leader >= 0 and (leader is None or leader.cached >= 0)
        return sequence.cached >= 0 or shares

    def let_begin(self) -> None:
        """The end of one hold_back()."""
        self._holds_back -= 1
        if self._holds_back:
            return
        for sequence in self._kept_back:
            self._waiting.push(sequence)
        self._kept_back = []

    @property
    def any_begun(self) -> bool:
        """Whether a request that has begun has not ended. While others are held back."""
        return self.num_running > 0 or self._waiting.first(self._sequences) is not None

    def recompute_all(self, *, restart: bool) -> tuple[int, ...]:
        """Forget all that was computed: whoever runs goes back to the queue. Nothing may be in flight.

        restart  from the prompt on, without the tokens that were sampled. Returns the requests that lost some.
        """
        for masks, token in self.take_accepted():
            masks.accept(token)
        self._preempt_all()
        self.pool.forget_all()
        lost: list[int] = []
        for request_id, sequence in self._sequences.items():
            sequence.registered = 0
            if restart and (sequence.tokens.size > sequence.request.prompt.size or sequence.scored):
                lost.append(request_id)
                sequence.tokens = sequence.request.prompt
                sequence.masks = None if sequence.request.form is None else sequence.request.form.start()
            if restart:
                sequence.computed = sequence.scored = 0
                del sequence.digests[len(sequence.request.digests) :]
        return tuple(lost)
