"""Faults of what single requests ask of their answers: lines of features, counts, log probabilities and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from gapless.engine.layout import Edits, Extras, StepShape
from gapless.engine.slots import Slot
from gapless.engine.stage import Extent, Half
from gapless.logits_processor import LogitsProcessor
from gapless.outcome import Committed, Sampled
from gapless.plan import Ints, Plan, RowLines
from gapless.request import Request
from gapless.rows import RowState
from gapless.sampling.records import LINE_HEADER
from gapless.waiting import SequenceState
from support.sim.faults.serving import AdmitsDifferently
from support.sim.parts import RigRunner, RigScheduler, RigSlots


class KeepsCounts(RigRunner):
    """A new row goes on with the counts of the one that had its place before."""

    def take_rows(self, rows_A: Tensor, begins_A1: Tensor, lines_P: Tensor) -> None:
        counts_RV = self.tables.features.counts_RV
        before = counts_RV[rows_A.long()].clone()
        super().take_rows(rows_A, begins_A1, lines_P)
        counts_RV[rows_A.long()] = before


class CountsLate(RigRunner):
    """Tokens are counted after the step that feeds them has sampled."""

    held: tuple[Tensor, Tensor, Tensor] | None = None
    finishing = False

    def count(self, tokens_T: Tensor, token_rows_T: Tensor, positions_T: Tensor) -> None:
        if self.finishing:
            self.held = (tokens_T, token_rows_T, positions_T)
        else:
            super().count(tokens_T, token_rows_T, positions_T)

    def finish(
        self,
        slot: Slot,
        shape: StepShape,
        extent: Extent,
        half: Half,
        edits: Edits,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self.finishing = True
        super().finish(slot, shape, extent, half, edits, processors)
        self.finishing = False
        if self.held is not None:
            super().count(*self.held)
        self.held = None


class OtherLines(RigScheduler):
    """What is sent of new rows' features; the faults change it."""

    def _lines_of(self, new_rows: list[int]) -> RowLines | None:
        lines = super()._lines_of(new_rows)
        return None if lines is None else self.change(lines)

    def change(self, lines: RowLines) -> RowLines:
        raise NotImplementedError


class ForgetsSkipped(OtherLines):
    """Tokens that were found in the prefix cache are not counted."""

    def change(self, lines: RowLines) -> RowLines:
        nothing = np.zeros(0, dtype=np.int32)
        return replace(lines, tokens_K=nothing, token_rows_K=nothing, positions_K=nothing)


class LinesOfOthers(OtherLines):
    """New rows get each other's features."""

    def change(self, lines: RowLines) -> RowLines:
        return replace(lines, rows_A=np.roll(lines.rows_A, 1))


class ArgumentsOfOthers(OtherLines):
    """New rows get each other's arguments for logits processors."""

    def change(self, lines: RowLines) -> RowLines:
        return replace(lines, arguments_G=np.roll(lines.arguments_G, 1))


class LeavesLines(RigScheduler):
    """A row whose new owner asks for nothing keeps what the one before asked for."""

    def _lines_of(self, new_rows: list[int]) -> RowLines | None:
        stale, self.rows.stale = self.rows.stale, np.zeros_like(self.rows.stale)
        lines = super()._lines_of(new_rows)
        self.rows.stale |= stale
        return lines


class LosesLinesOfFailedSteps(RigScheduler):
    """An empty line that did not get there, since its step ran out of memory, counts as sent."""

    def abandon(self, failed: Plan, skipped: Sequence[Plan]) -> Committed:
        without = [replace(plan, lines=None) for plan in (failed, *skipped)]
        return super().abandon(without[0], without[1:])


class IgnoresMinTokens(RigScheduler):
    """What was preempted may end at once when it comes back."""

    def _take_row(self, sequence: SequenceState, shared: list[int]) -> int:
        request = sequence.request
        if sequence.cached >= 0 and request.line.size:
            line = request.line.copy()
            biases, bans = line[LINE_HEADER : LINE_HEADER + 2].tolist()
            begin = LINE_HEADER + 3 + 2 * biases + bans
            line[begin : begin + bans] = 0
            sequence.request = replace(request, line=line)
        return super()._take_row(sequence, shared)


class ForgetsBadWords(AdmitsDifferently):
    """The tokens of a request that only has bad words are not kept."""

    def change(self, request: Request) -> Request:
        return replace(request, counts=False)


class LogprobsOfOthers(RigScheduler):
    """Each token gets the log probabilities of the next entry."""

    def commit(self, plan: Plan, sampled: Sampled) -> Committed:
        committed = super().commit(plan, sampled)
        if committed.logprobs is None:
            return committed
        lines = np.roll(np.arange(committed.tokens.size), -1)
        return replace(committed, logprobs=committed.logprobs.at(lines))


class LogprobsWithOvershoot(RigScheduler):
    """Lines of rows that have ended stay among those of the others."""

    def commit(self, plan: Plan, sampled: Sampled) -> Committed:
        committed = super().commit(plan, sampled)
        return replace(committed, logprobs=sampled.logprobs)


class ReadsLinesEarly(RigSlots):
    """The host looks at the log probabilities before their copy has ended."""

    def collect(self, slot: Slot) -> Sampled:
        if slot.brings.logprobs:
            slot._lines.copy()  # pyright: ignore[reportPrivateUsage]
        return super().collect(slot)


class KeepsViewOfLines(RigSlots):
    """Log probabilities are a view of pinned memory."""

    def collect(self, slot: Slot) -> Sampled:
        sampled = super().collect(slot)
        if sampled.logprobs is None:
            return sampled
        size = sampled.logprobs.ranks_L.size
        ranks = slot.host_lines.numpy()[:size]
        return replace(sampled, logprobs=replace(sampled.logprobs, ranks_L=ranks))


class ScoresAgain(RigScheduler):
    """The prompt of a preempted request is scored from the beginning once more."""

    def _release(self, row: int) -> None:
        owner, preempted = self._row_owner[row], self.rows.state[row] == RowState.PREEMPTED
        super()._release(row)
        if preempted and owner is not None:
            owner.scored = 0


class SkipsScores(RigScheduler):
    """A prompt that is scored begins where the prefix cache ends."""

    def _find_shared(self, sequence: SequenceState, needed: int, room: int) -> list[int] | None:
        scored, sequence.scored = sequence.scored, sequence.tokens.size
        try:
            return super()._find_shared(sequence, needed, room)
        finally:
            sequence.scored = scored


class ScoresOfTheNext(RigScheduler):
    """Each token of a prompt gets the log probabilities of the token behind it."""

    def commit(self, plan: Plan, sampled: Sampled) -> Committed:
        if (scores := sampled.scores) is not None:
            sampled = replace(sampled, scores=scores.at(np.roll(np.arange(scores.ranks_L.size), -1)))
        return super().commit(plan, sampled)


def scores_in_the_gap(plan: Plan, tokens_RL: Ints, packed: Ints, shape: StepShape, scratch_row: int) -> None:
    """Prompts are scored as if no padding stood between the decodes and the chunks."""
    if plan.scores is not None:
        packed[Extras.of(plan, shape).indices_Q] = plan.scores.indices_Q
