"""The log probabilities of prompts: which tokens' a step brings, and which of those are news."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from gapless.errors import InternalError
from gapless.outcome import LogprobLines, PromptLogprobs
from gapless.plan import Ints, PromptScores
from gapless.request import Request
from gapless.rows import RowTable
from gapless.waiting import SequenceState


def scores_of(
    table: RowTable, owners: Sequence[SequenceState | None], rows: Ints, starts: Ints, counts: Ints
) -> PromptScores | None:
    """The tokens of prompts whose logprobs this step brings: those after the ones that it feeds."""
    pieces: list[tuple[Request, int, int, int]] = []
    begins = np.cumsum(counts) - counts
    for entry in np.flatnonzero(table.scores[rows] >= 0).tolist():
        owner, start = owners[rows[entry]], int(starts[entry])
        assert owner is not None
        first, end = max(start, owner.scored), min(start + int(counts[entry]), owner.request.prompt.size - 1)
        if first < end:
            pieces.append((owner.request, first, end, int(begins[entry]) + first - start))
    return PromptScores.of(pieces) if pieces else None


def book_scores(
    sequences: Mapping[int, SequenceState], scores: PromptScores, lines: LogprobLines | None
) -> tuple[PromptLogprobs, ...]:
    """The prompts' log probabilities, without those that are known: a prompt may be computed again. Counts them."""
    if lines is None:
        raise InternalError("a step was to bring log probabilities of prompts and brought none")
    found: list[PromptLogprobs] = []
    ids = scores.request_ids_Q
    cuts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), ids.size]
    for begin, end in itertools.pairwise(cuts):
        owner = sequences.get(int(ids[begin]))
        if owner is None:
            continue
        first = int(scores.positions_Q[begin])
        known = max(0, owner.scored - first)
        if begin + known < end:
            found.append(
                PromptLogprobs(owner.request.request_id, first + known + 1, lines.at(slice(begin + known, end)))
            )
            owner.scored = first + end - begin
    return tuple(found)
