"""One step's decisions: lengths, places and parameters, never token values. Complete when constructed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gapless.request import Request

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

_NOTHING = np.zeros(0, dtype=np.int32)
PLACEHOLDER = -1
"""Stands for an input token that the host does not know yet; the device puts in the row's last token."""


@dataclass(frozen=True, slots=True, eq=False)
class RowParams:
    """Sampling parameters of rows that were taken in this step, to be written to the device tables. A rows."""

    rows_A: Ints
    temperature_A: NDArray[np.float32]
    top_k_A: Ints
    top_p_A: NDArray[np.float32]
    min_p_A: NDArray[np.float32]
    seed_A: NDArray[np.uint64]

    @classmethod
    def of(cls, requests: Mapping[int, Request]) -> RowParams:
        """Of these requests by row."""
        params = [request.params for request in requests.values()]
        return cls(
            rows_A=np.asarray(list(requests), dtype=np.int32),
            temperature_A=np.asarray([each.temperature for each in params], dtype=np.float32),
            top_k_A=np.asarray([each.top_k for each in params], dtype=np.int32),
            top_p_A=np.asarray([each.top_p for each in params], dtype=np.float32),
            min_p_A=np.asarray([each.min_p for each in params], dtype=np.float32),
            seed_A=np.asarray([request.seed for request in requests.values()], dtype=np.uint64),
        )


@dataclass(frozen=True, slots=True, eq=False)
class RowLines:
    """What rows that were taken in this step ask of their logits, and their tokens that no step feeds. A rows.

    A row whose features on the device are of an earlier owner has an empty line, too.

    begins_A1  where each line begins and ends in lines_P
    lines_P    see sampling/records.py
    tokens_K   of rows that count their tokens: those before the first that is fed, found in the prefix cache; with
               their rows and positions
    arguments_G  float32 bits: for each row an argument for each of the engine's logits processors
    """

    rows_A: Ints
    begins_A1: Ints
    lines_P: Ints
    tokens_K: Ints
    token_rows_K: Ints
    positions_K: Ints
    arguments_G: Ints

    @classmethod
    def of(cls, lines: Mapping[int, Ints], skipped: Mapping[int, Ints], arguments: Mapping[int, Floats]) -> RowLines:
        """From lines, skipped tokens and arguments by row: arguments for all of `lines` or for none."""
        begins = np.zeros(len(lines) + 1, dtype=np.int32)
        np.cumsum([line.size for line in lines.values()], out=begins[1:])
        sizes = [tokens.size for tokens in skipped.values()]
        return cls(
            rows_A=np.asarray(list(lines), dtype=np.int32),
            begins_A1=begins,
            lines_P=np.concatenate([_NOTHING, *lines.values()]),
            tokens_K=np.concatenate([_NOTHING, *skipped.values()]),
            token_rows_K=np.repeat(np.asarray(list(skipped), dtype=np.int32), sizes),
            positions_K=np.concatenate([_NOTHING, *(np.arange(size, dtype=np.int32) for size in sizes)]),
            arguments_G=np.concatenate([_NOTHING, *(each.view(np.int32) for each in arguments.values())]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class PromptScores:
    """Tokens of prompts whose log probabilities are asked for: of the token after each of these. Q tokens.

    request_ids_Q  whose prompt
    positions_Q    of the token that is fed, the one before it
    indices_Q      of the token that is fed among the tokens of the step
    targets_Q      the token
    wanted_Q       how many of the likeliest are asked for, too
    """

    request_ids_Q: NDArray[np.int64]
    positions_Q: Ints
    indices_Q: Ints
    targets_Q: Ints
    wanted_Q: Ints

    @classmethod
    def of(cls, pieces: Sequence[tuple[Request, int, int, int]]) -> PromptScores:
        """Of each request the fed positions, first and end, and the index of the first of them."""
        sizes = [end - first for _, first, end, _ in pieces]
        positions = [np.arange(first, end, dtype=np.int32) for _, first, end, _ in pieces]
        return cls(
            request_ids_Q=np.repeat(np.asarray([each[0].request_id for each in pieces], dtype=np.int64), sizes),
            positions_Q=np.concatenate(positions),
            indices_Q=np.concatenate([at - at[0] + piece[3] for at, piece in zip(positions, pieces, strict=True)]),
            targets_Q=np.concatenate([each[0].prompt[each[1] + 1 : each[2] + 1] for each in pieces]),
            wanted_Q=np.repeat(np.asarray([each[0].params.prompt_logprobs for each in pieces], dtype=np.int32), sizes),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What one step runs. Entries that have exactly one query token come first.

    rows_E           row of each entry
    starts_E         position of the entry's first query token
    counts_E         query tokens of each entry, >= 1
    samples_E        tokens that the entry samples: 1 where the step reaches the end of the sequence, else 0
    num_samples      sum of samples_E
    num_decodes      entries with one query token
    num_tokens       sum of counts_E
    block_*_U        block table columns that were filled for this step: table[row, column] = block
    params           sampling parameters of newly taken rows
    all_greedy       no entry needs a random number
    lines            what new rows ask of their logits, None if there is nothing to send
    featured         an entry asks something of its logits, so counts and edits are to be made
    masked           a sampled token must fit the form of its answer: sampling waits for masks
    processed        logits processors are to be run
    logprobs         log probabilities of sampled tokens are asked for
    scores           and these of prompts
    continues        the entries are those of the step before, all decode again, and no row is new: each is a position
                     further, and its token is the one that it sampled then
    """

    step: int
    rows_E: Ints
    starts_E: Ints
    counts_E: Ints
    samples_E: Ints
    num_samples: int
    num_decodes: int
    num_tokens: int
    block_rows_U: Ints
    block_columns_U: Ints
    block_ids_U: Ints
    params: RowParams
    all_greedy: bool
    lines: RowLines | None = None
    featured: bool = False
    masked: bool = False
    processed: bool = False
    logprobs: bool = False
    scores: PromptScores | None = None
    continues: bool = False

    @property
    def decode_only(self) -> bool:
        """Every entry decodes one token and no row is new: such steps replay a graph."""
        return self.num_tokens == self.rows_E.size == self.num_samples and not self.params.rows_A.size


NO_PARAMS = RowParams.of({})


def empty_plan() -> Plan:
    """A plan without entries: filled into a shape, it is all padding."""
    return Plan(
        step=-1,
        rows_E=_NOTHING,
        starts_E=_NOTHING,
        counts_E=_NOTHING,
        samples_E=_NOTHING,
        num_samples=0,
        num_decodes=0,
        num_tokens=0,
        block_rows_U=_NOTHING,
        block_columns_U=_NOTHING,
        block_ids_U=_NOTHING,
        params=NO_PARAMS,
        all_greedy=True,
    )
