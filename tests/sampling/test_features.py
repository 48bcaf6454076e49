from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers.generation import logits_process as theirs

from gapless.errors import InternalError
from gapless.sampling import SamplingTables, TorchSampler, torch_features
from gapless.sampling.features import (
    BAD_WORD_TOKENS,
    EDITS,
    IN_PROMPT,
    MAX_BAD_WORDS,
    MAX_BANS,
    MAX_BIAS,
    FeatureTables,
    StepMasks,
)
from gapless.sampling.records import LINE_HEADER, RowFeatures, bit_mask, longest_line, pack_lines
from support.features import Case, random_logits

CPU = torch.device("cpu")
ROWS, VOCAB = 12, 90


def case_of(row: RowFeatures, history: list[int], vocab: int = VOCAB) -> Case:
    return Case(vocab, [row], [np.asarray(history, dtype=np.int32)])


def edited(case: Case, logits_EV: Tensor, masks: StepMasks | None = None, seed: int = 0) -> Tensor:
    """The reference's edits of every row."""
    tables = case.tables(np.random.default_rng(seed), CPU, torch_features)
    return torch_features.edit_logits(logits_EV, case.rows_E, case.positions_E, tables, masks)


def edited_alone(row: RowFeatures, history: list[int], logits_V: Tensor, masks: StepMasks | None = None) -> Tensor:
    return edited(case_of(row, history, len(logits_V)), logits_V[None], masks)[0]


def apply(processor: Any, history: NDArray[np.int32], logits_V: Tensor) -> Tensor:
    """What one of transformers' processors makes of a row."""
    return processor(torch.from_numpy(history.astype(np.int64))[None], logits_V[None])[0]


def processors(row: RowFeatures, history: NDArray[np.int32]) -> list[Any]:
    """Transformers' own for what it knows of a row's features, but for presence and frequency, in our order."""
    found: list[Any] = []
    if row.repetition != 1.0:
        found.append(theirs.RepetitionPenaltyLogitsProcessor(row.repetition))
    found.append(less_often(row, history))
    if row.bias:
        biases: Any = {(token,): bias for token, bias in row.bias.items()}
        found.append(theirs.SequenceBiasLogitsProcessor(biases))
    if banned := [token for token, first in row.bans.items() if len(history) < first]:
        found.append(theirs.SuppressTokensLogitsProcessor(banned, device="cpu"))
    if row.bad_words:
        found.append(theirs.NoBadWordsLogitsProcessor([list(word) for word in row.bad_words], eos_token_id=None))
    if row.allowed is not None:
        allowed = list(row.allowed)

        def allowed_next(_batch: int, _sequence: Tensor) -> list[int]:
            return allowed

        found.append(theirs.PrefixConstrainedLogitsProcessor(allowed_next, num_beams=1))
    return found


def less_often(row: RowFeatures, history: NDArray[np.int32]) -> Any:
    """Presence and frequency as OpenAI defines them, over what was generated."""
    counts_V = torch.bincount(torch.from_numpy(history[row.prompt_len :]).long(), minlength=VOCAB)

    def process(_: Tensor, scores_EV: Tensor) -> Tensor:
        frequency, presence = torch.tensor([row.frequency, row.presence])
        return scores_EV - counts_V * frequency - (counts_V > 0) * presence

    return process


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_edits_are_those_of_transformers_one_after_the_other(seed: int):
    rng = np.random.default_rng(seed)
    case = Case.random(rng, ROWS, VOCAB)
    known: list[RowFeatures] = []
    for row, history in zip(case.features, case.histories, strict=True):
        # theirs looks at a bad word only where the sequence is as long as it, though one token less would do
        words = [word for word in row.bad_words if len(word) <= len(history)]
        known.append(replace(row, bad_words=words, masked=False))
    case = replace(case, features=known)
    logits_EV = torch.from_numpy(rng.normal(0, 4, (ROWS, VOCAB)).astype(np.float32))
    edited_EV = edited(case, logits_EV, seed=seed)
    for entry, (row, history) in enumerate(zip(case.features, case.histories, strict=True)):
        scores_V = logits_EV[entry]
        for processor in processors(row, history):
            scores_V = apply(processor, history, scores_V)
        assert torch.equal(edited_EV[entry], scores_V), row


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_counts_do_not_depend_on_how_steps_cut_the_tokens(seed: int):
    rng = np.random.default_rng(seed)
    case = Case.random(rng, ROWS, VOCAB)
    tables = case.tables(rng, CPU, torch_features)
    for index, (row, history) in enumerate(zip(case.features, case.histories, strict=True)):
        if row.flags & 1:
            counts_V = np.bincount(history[row.prompt_len :], minlength=VOCAB)
            counts_V[history[: row.prompt_len]] |= IN_PROMPT
            assert np.array_equal(tables.counts_RV[index].numpy(), counts_V)
        if row.flags & 16:
            for position in range(max(0, len(history) - BAD_WORD_TOKENS), len(history)):
                assert tables.last_RH[index, position % BAD_WORD_TOKENS] == history[position]
    assert tables.flags_R[ROWS] == 0
    assert (tables.counts_RV[ROWS] == 3).all()  # the scratch row is left alone


def test_repetition_looks_at_the_prompt_and_the_other_penalties_do_not():
    logits_V = torch.tensor([2.0, 2.0, -2.0, 2.0, 2.0])
    row = RowFeatures(prompt_len=2, repetition=2.0, presence=0.25, frequency=0.5)
    assert edited_alone(row, [0, 2, 1, 1, 3], logits_V).tolist() == [1.0, 1 - 1.25, -4.0, 1 - 0.75, 2.0]


def test_a_token_counts_once_it_is_fed_and_not_when_it_is_sampled():
    case = case_of(RowFeatures(prompt_len=1, presence=1.0), [7, 8])
    tables = case.tables(np.random.default_rng(0), CPU, torch_features)
    assert tables.counts_RV[0].nonzero().flatten().tolist() == [7, 8]
    token, row, position = (torch.tensor([value], dtype=torch.int32) for value in (9, 0, 2))
    torch_features.count_tokens(token, row, position, tables)
    assert tables.counts_RV[0, [7, 8, 9]].tolist() == [IN_PROMPT, 1, 1]


def test_a_row_that_is_taken_again_counts_from_nothing():
    rng = np.random.default_rng(1)
    case = case_of(RowFeatures(prompt_len=2, frequency=1.0, bad_words=[[3, 4, 5]]), [3, 3, 4, 3, 4])
    once = case.tables(rng, CPU, torch_features)
    again = case.tables(rng, CPU, torch_features)
    begins_A1, lines_P = (torch.from_numpy(each) for each in pack_lines([case.features[0].line(VOCAB)]))
    row = torch.zeros(1, dtype=torch.int32)
    torch_features.take_rows(row, begins_A1, lines_P, again)
    assert not again.counts_RV[0].any()
    fed = torch.tensor(case.histories[0])
    torch_features.count_tokens(fed, torch.zeros_like(fed), torch.arange(5, dtype=torch.int32), again)
    for (name, table), (_, expected) in zip(again.by_name(), once.by_name(), strict=True):
        assert torch.equal(table, expected), name


def test_a_plain_line_is_empty_and_makes_its_row_plain():
    case = case_of(RowFeatures(prompt_len=1, masked=True, num_logprobs=3), [1])
    tables = case.tables(np.random.default_rng(0), CPU, torch_features)
    assert tables.flags_R[0] != 0
    plain = RowFeatures(prompt_len=9).line(VOCAB)
    assert plain.size == 0
    begins_A1, lines_P = (torch.from_numpy(each) for each in pack_lines([plain]))
    torch_features.take_rows(torch.zeros(1, dtype=torch.int32), begins_A1, lines_P, tables)
    assert tables.flags_R[0] == 0
    assert tables.num_logprobs_R[0] == -1


@pytest.mark.parametrize(("new", "banned"), [(0, True), (2, True), (3, False)])
def test_ids_that_end_a_request_are_banned_until_it_has_min_tokens(new: int, banned: bool):
    history = np.arange(5 + new, dtype=np.int32)
    row = RowFeatures(prompt_len=5, bans=dict.fromkeys((11, 12), 5 + 3))
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    edited_V = edited_alone(row, history.tolist(), logits_V)
    assert (edited_V[[11, 12]] == -math.inf).all() == banned
    processor = theirs.MinNewTokensLengthLogitsProcessor(5, 3, [11, 12])
    assert torch.equal(edited_V, apply(processor, history, logits_V))


def test_a_bad_word_is_banned_at_its_last_token_only_and_never_past_the_start():
    row = RowFeatures(prompt_len=1, bad_words=[[1, 2, 3], [6]])
    logits_V = torch.zeros(8)

    def banned(history: list[int]) -> list[int]:
        return (edited_alone(row, history, logits_V) == -math.inf).nonzero().flatten().tolist()

    assert banned([1, 2]) == [3, 6]
    assert banned([2]) == [6]
    assert banned([2, 1]) == [6]
    assert banned([1, 2, 3]) == [6]
    assert banned([5] * 40 + [1, 2]) == [3, 6]
    row = replace(row, bad_words=[[3, 3, 5]])  # before its first token stands nothing, whatever the tables held
    assert banned([3]) == []
    longest = list(range(8)) * 2
    row = replace(row, bad_words=[longest])
    assert banned([5, *longest[:-1]]) == [7]
    assert banned([5, *longest[1:-1]]) == []
    assert banned(longest[1:-1]) == []


def test_only_allowed_tokens_are_left_and_masks_of_a_step_come_on_top():
    logits_V = torch.zeros(40)
    masks = StepMasks(torch.from_numpy(bit_mask([0, 31, 32], 40))[None], torch.zeros(1, dtype=torch.int32))

    def left(row: RowFeatures, masks: StepMasks | None) -> list[int]:
        return (edited_alone(row, [1], logits_V, masks) > -math.inf).nonzero().flatten().tolist()

    allowed = RowFeatures(prompt_len=1, allowed=[31, 32, 39])
    assert left(allowed, None) == [31, 32, 39]
    assert left(replace(allowed, masked=True), masks) == [31, 32]
    assert left(RowFeatures(prompt_len=1, bias={0: 1.0}), masks) == [0, 31, 32]
    assert left(RowFeatures(prompt_len=1, masked=True), masks) == [0, 31, 32]


def test_a_mask_holds_for_a_row_that_asked_for_nothing():
    case = case_of(RowFeatures(prompt_len=1), [1], vocab=40)
    features = case.tables(np.random.default_rng(0), CPU, torch_features)
    masks = StepMasks(torch.from_numpy(bit_mask([32, 33], 40))[None], torch.zeros(1, dtype=torch.int32))
    arguments = (torch.zeros(1, 40), case.rows_E, case.positions_E, SamplingTables.allocate(2, CPU))
    assert TorchSampler().sample(*arguments, all_greedy=True, features=features, masks=masks).tolist() == [32]


@pytest.mark.parametrize("index", [-1, 1, 70])
def test_a_missing_mask_allows_nothing(index: int):
    logits_V = torch.zeros(40)
    all_allowed = torch.full((1, 2), -1, dtype=torch.int32)
    masks = StepMasks(all_allowed, torch.tensor([index], dtype=torch.int32))
    row = RowFeatures(prompt_len=1, masked=True)
    assert (edited_alone(row, [1], logits_V, masks) == -math.inf).all()
    assert (edited_alone(row, [1], logits_V, None) == -math.inf).all()


def test_logits_are_cleaned_before_they_are_edited():
    logits_V = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    row = RowFeatures(prompt_len=1, repetition=2.0, bias={0: 5.0, 1: -1.0, 2: 5.0})
    largest = torch.finfo(torch.bfloat16).max
    assert edited_alone(row, [1], logits_V.bfloat16()).tolist() == [-math.inf, largest / 2, -math.inf, 1.0]


def test_an_edit_is_not_rounded_to_the_type_of_the_logits():
    logits_EV = torch.tensor([[10.0, 10.0, 0.0]], dtype=torch.bfloat16)
    case = case_of(RowFeatures(prompt_len=1, bias={1: 0.01}), [2], vocab=3)
    features = case.tables(np.random.default_rng(0), CPU, torch_features)
    arguments = (logits_EV, case.rows_E, case.positions_E, SamplingTables.allocate(2, CPU))
    assert TorchSampler().sample(*arguments, all_greedy=True).tolist() == [0]
    assert TorchSampler().sample(*arguments, all_greedy=True, features=features).tolist() == [1]


@pytest.mark.parametrize("all_greedy", [True, False])
@pytest.mark.parametrize("with_masks", [True, False])
def test_rows_are_sampled_from_their_edited_logits_and_plain_rows_as_before(with_masks: bool, all_greedy: bool):
    rng = np.random.default_rng(3)
    case = Case.random(rng, 40, VOCAB)
    features = case.tables(rng, CPU, torch_features)
    masks = case.masks(rng, CPU) if with_masks else None
    logits_EV = random_logits(rng, 40, VOCAB, torch.bfloat16)
    tables = SamplingTables.allocate(41, CPU)
    if not all_greedy:
        tables.temperature_R.fill_(1.0)
        tables.top_p_R.fill_(0.9)
    arguments = (case.rows_E, case.positions_E, tables)
    tokens_E = TorchSampler().sample(logits_EV, *arguments, all_greedy=all_greedy, features=features, masks=masks)
    as_before_E = TorchSampler().sample(logits_EV, *arguments, all_greedy=all_greedy)
    edited_EV = edited(case, logits_EV, masks)
    from_edited_E = TorchSampler().sample(edited_EV, *arguments, all_greedy=all_greedy)
    edited_E = torch.tensor([row.flags & EDITS != 0 for row in case.features])
    edited_E |= masks.index_E >= 0 if masks else False
    assert 5 < edited_E.sum() < 38
    assert torch.equal(tokens_E, torch.where(edited_E, from_edited_E, as_before_E))


def test_lines_are_as_long_as_they_are_said_to_be_at_most():
    full = RowFeatures(
        prompt_len=1,
        repetition=2.0,
        bias=dict.fromkeys(range(MAX_BIAS), 1.0),
        bans=dict.fromkeys(range(MAX_BANS), 5),
        bad_words=[[1] * BAD_WORD_TOKENS] * MAX_BAD_WORDS,
        allowed=range(3),
        num_logprobs=20,
    )
    assert full.line(2000).size == longest_line(2000)
    assert FeatureTables.allocate(2, 2000, CPU).record_RX.shape[1] == longest_line(2000) - LINE_HEADER - 63


@pytest.mark.parametrize(
    "row",
    [
        RowFeatures(prompt_len=1, bias=dict.fromkeys(range(MAX_BIAS + 1), 1.0)),
        RowFeatures(prompt_len=1, bias={VOCAB * 20: 1.0}),
        RowFeatures(prompt_len=1, bias={1: math.nan}),
        RowFeatures(prompt_len=1, bias={-1: 1.0}),
        RowFeatures(prompt_len=1, bans=dict.fromkeys(range(MAX_BANS + 1), 1)),
        RowFeatures(prompt_len=1, bad_words=[[1, 2]] * (MAX_BAD_WORDS + 1)),
        RowFeatures(prompt_len=1, bad_words=[[1] * (BAD_WORD_TOKENS + 1)]),
        RowFeatures(prompt_len=1, bad_words=[[1, 2], []]),
        RowFeatures(prompt_len=1, bad_words=[[1, VOCAB * 20]]),
        RowFeatures(prompt_len=1, allowed=[VOCAB * 20]),
        RowFeatures(prompt_len=1, repetition=0.0),
        RowFeatures(prompt_len=1, frequency=math.inf),
        RowFeatures(prompt_len=1, num_logprobs=21),
    ],
)
def test_what_a_line_can_not_hold_is_an_internal_error(row: RowFeatures):
    with pytest.raises(InternalError):
        row.line(VOCAB * 20)
