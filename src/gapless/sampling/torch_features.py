"""Features in plain torch: it defines the answer on any device. Reads values on the host: for CPUs, and for tests.

Letters as in features.py, and N entries whose logits are edited.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gapless.sampling.base import clean_logits
from gapless.sampling.features import (
    ALLOWED,
    ANY_TOKEN,
    BAD_WORD_TOKENS,
    BAD_WORDS,
    EDITS,
    IN_PROMPT,
    LISTS,
    MASKED,
    PENALTIES,
    RECORD_HEADER,
    WORD_BITS,
    FeatureTables,
    StepMasks,
)
from gapless.sampling.records import LINE_HEADER


def take_rows(rows_A: Tensor, begins_A1: Tensor, lines_P: Tensor, tables: FeatureTables) -> None:
    """Give newly taken rows their features, and nothing counted. See records.py pack_lines for the lines, int32.

    Before any token of these rows is counted. Rows are distinct, but for padding: empty lines for the scratch row.
    """
    for row, begin, end in zip(rows_A.tolist(), begins_A1[:-1].tolist(), begins_A1[1:].tolist(), strict=True):
        line_P = lines_P[begin:end]
        tables.flags_R[row] = 0
        tables.num_logprobs_R[row] = -1
        if begin == end:
            continue
        flags, prompt_len, num_logprobs = line_P[:3].tolist()
        tables.flags_R[row] = flags
        tables.prompt_len_R[row] = prompt_len
        tables.num_logprobs_R[row] = num_logprobs
        penalties = line_P[3:6].view(torch.float32)
        tables.repetition_R[row], tables.presence_R[row], tables.frequency_R[row] = penalties
        record, allowed = line_P[6:8].tolist()
        tables.record_RX[row, :record] = line_P[LINE_HEADER : LINE_HEADER + record]
        tables.allowed_RW[row, :allowed] = line_P[LINE_HEADER + record : LINE_HEADER + record + allowed]
        tables.last_RH[row] = ANY_TOKEN
        if flags & PENALTIES:
            tables.counts_RV[row] = 0


def count_tokens(tokens_T: Tensor, token_rows_T: Tensor, positions_T: Tensor, tables: FeatureTables) -> None:
    """Count the tokens that a step feeds, once they are all known, before it samples. int32[T] each.

    A row's tokens stand side by side in the order of their positions. Tokens of plain rows are skipped.
    """
    rows_T, positions_T = token_rows_T.long(), positions_T.long()
    known_T = (tokens_T >= 0) & (tokens_T < tables.vocab)
    flags_T = torch.where(known_T, tables.flags_R[rows_T], 0)

    newest_T = flags_T & BAD_WORDS != 0  # of a long chunk only the latest tokens, which have a place each
    newest_T[:-BAD_WORD_TOKENS] &= rows_T[BAD_WORD_TOKENS:] != rows_T[:-BAD_WORD_TOKENS]
    places = (rows_T[newest_T], positions_T[newest_T] % BAD_WORD_TOKENS)
    tables.last_RH[places] = tokens_T[newest_T]

    penalised_T = flags_T & PENALTIES != 0
    in_prompt_T = positions_T < tables.prompt_len_R[rows_T]
    places = (rows_T[penalised_T & in_prompt_T], tokens_T[penalised_T & in_prompt_T].long())
    tables.counts_RV[places] = tables.counts_RV[places] | IN_PROMPT
    places = (rows_T[penalised_T & ~in_prompt_T], tokens_T[penalised_T & ~in_prompt_T].long())
    one = torch.ones((), dtype=torch.int32, device=tokens_T.device)
    tables.counts_RV.index_put_(places, one, accumulate=True)


def edited_entries(rows_E: Tensor, tables: FeatureTables, masks: StepMasks | None) -> Tensor:
    """Whether an entry's logits are edited: bool[E]."""
    edited_E = tables.flags_R[rows_E.long()] & EDITS != 0
    return edited_E if masks is None else edited_E | (masks.index_E >= 0)


def edit_logits(
    logits_NV: Tensor, rows_N: Tensor, positions_N: Tensor, tables: FeatureTables, masks: StepMasks | None
) -> Tensor:
    """The edited logits, float32[N, V], for tokens at `positions_N`; masks.index_E counts these N entries."""
    rows_N = rows_N.long()
    edited_NV = penalised(clean_logits(logits_NV), rows_N, tables)
    flags_N = tables.flags_R[rows_N].tolist()
    for n, (row, position, flags) in enumerate(zip(rows_N.tolist(), positions_N.tolist(), flags_N, strict=True)):
        edited_V = edited_NV[n]
        if flags & LISTS:
            edit_by_lists(edited_V, tables.record_RX[row], tables.last_RH[row], position)
        if flags & ALLOWED:
            forbid(edited_V, tables.allowed_RW[row])
        index = -1 if masks is None else int(masks.index_E[n])
        if masks is not None and 0 <= index < len(masks.mask_MW):
            forbid(edited_V, masks.mask_MW[index])
        elif flags & MASKED or index >= 0:
            edited_V.fill_(-torch.inf)
    return edited_NV


def penalised(scores_NV: Tensor, rows_N: Tensor, tables: FeatureTables) -> Tensor:
    """Scores after the penalties for what was there before."""
    on_N1 = (tables.flags_R[rows_N] & PENALTIES != 0)[:, None]
    counts_NV = tables.counts_RV[rows_N]
    repetition_N1 = tables.repetition_R[rows_N, None]
    repeated_NV = torch.where(scores_NV < 0, scores_NV * repetition_N1, scores_NV / repetition_N1)
    result_NV = torch.where(counts_NV != 0, repeated_NV, scores_NV)
    generated_NV = counts_NV & (IN_PROMPT - 1)
    less_NV = result_NV - generated_NV.float() * tables.frequency_R[rows_N, None] - tables.presence_R[rows_N, None]
    return torch.where(on_N1, torch.where(generated_NV > 0, less_NV, result_NV), scores_NV)


def edit_by_lists(edited_V: Tensor, record_X: Tensor, last_H: Tensor, position: int) -> None:
    """Add the biases, then ban what is banned at this position and what would end a bad word."""
    biases, bans, words = record_X[:RECORD_HEADER].tolist()
    sizes = [RECORD_HEADER, biases, biases, bans, bans, words * BAD_WORD_TOKENS]
    _, bias_ids, values, ban_ids, first_positions, sequences = record_X[: sum(sizes)].split(sizes)
    edited_V[bias_ids.long()] += values.view(torch.float32)
    edited_V[ban_ids[position < first_positions].long()] = -torch.inf
    back = torch.arange(1, BAD_WORD_TOKENS, device=last_H.device)
    before = last_H[(position - back) % BAD_WORD_TOKENS]
    sequences = sequences.view(words, BAD_WORD_TOKENS)
    ends = ((sequences[:, 1:] == before) | (sequences[:, 1:] == ANY_TOKEN)).all(dim=1)
    edited_V[sequences[ends, 0].long()] = -torch.inf


def forbid(edited_V: Tensor, mask_W: Tensor) -> None:
    """-inf for tokens whose bit is not set."""
    bits = mask_W[:, None] >> torch.arange(WORD_BITS, dtype=torch.int32, device=mask_W.device) & 1
    edited_V[bits.flatten()[: len(edited_V)] == 0] = -torch.inf
