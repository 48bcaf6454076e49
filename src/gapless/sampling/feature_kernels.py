"""The kernels of features: rows taken, tokens counted, logits edited. See features.py and torch_features.py for what.

    take_kernel   several programs per taken row: they write its line, and empty its counts
    count_kernel  a lane per token that the step feeds
    edit_kernel   several programs per entry, a span of the vocabulary each: tile by tile with what concerns every
                  token, then, once these are stored, what the row's lists name within the span

Entries without lists can be left to the sampler's first pass, which reads every logit anyway and edits it on its way.

Programs leave at once where a row is plain. Nothing waits for the host, and nothing depends on the order of programs,
so a captured graph serves any mix of rows. Edited logits go to a buffer in float32 beside the model's own.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl

from gapless.kernels.dependent import follow
from gapless.sampling import features, records
from gapless.sampling.triton_math import load_tile

ALLOWED = tl.constexpr(features.ALLOWED)
BAD_WORDS, EDITS = tl.constexpr(features.BAD_WORDS), tl.constexpr(features.EDITS)
MASKED, PENALTIES = tl.constexpr(features.MASKED), tl.constexpr(features.PENALTIES)
LISTS = tl.constexpr(features.LISTS)
AS_THEY_ARE, BESIDE, IN_PASSING = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # where an entry's logits are
IN_PROMPT = tl.constexpr(features.IN_PROMPT)
WORD_BITS = tl.constexpr(features.WORD_BITS)
HISTORY = tl.constexpr(features.BAD_WORD_TOKENS)
RECORD_HEADER, RECORD_SIZE = tl.constexpr(features.RECORD_HEADER), tl.constexpr(features.RECORD_SIZE)
LINE_HEADER = tl.constexpr(records.LINE_HEADER)
ANY_TOKEN = tl.constexpr(features.ANY_TOKEN)

LIST_BLOCK = tl.constexpr(256)
WORDS_BLOCK = tl.constexpr(32)


@triton.jit
def copy_numbers(source_ptr, target_ptr, count, part, parts, BLOCK: tl.constexpr):
    """This part's share of `count` numbers."""
    for first in range(part * BLOCK, count, parts * BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(target_ptr + at, tl.load(source_ptr + at, mask=at < count), mask=at < count)


@triton.jit
def take_kernel(
    rows_ptr,
    begins_ptr,
    lines_ptr,
    flags_ptr,
    prompt_len_ptr,
    num_logprobs_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    counts_ptr,
    last_ptr,
    record_ptr,
    allowed_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    follow(DEPENDENT)
    index = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    row = tl.load(rows_ptr + index).to(tl.int64)
    begin = tl.load(begins_ptr + index)
    plain = tl.load(begins_ptr + index + 1) == begin
    line_ptr = lines_ptr + begin
    if plain:
        if part == 0:
            tl.store(flags_ptr + row, 0)
            tl.store(num_logprobs_ptr + row, -1)
    else:
        flags = tl.load(line_ptr)
        if part == 0:
            tl.store(flags_ptr + row, flags)
            tl.store(prompt_len_ptr + row, tl.load(line_ptr + 1))
            tl.store(num_logprobs_ptr + row, tl.load(line_ptr + 2))
            tl.store(repetition_ptr + row, tl.load(line_ptr + 3).to(tl.float32, bitcast=True))
            tl.store(presence_ptr + row, tl.load(line_ptr + 4).to(tl.float32, bitcast=True))
            tl.store(frequency_ptr + row, tl.load(line_ptr + 5).to(tl.float32, bitcast=True))
            tl.store(last_ptr + row * HISTORY + tl.arange(0, HISTORY), tl.full([HISTORY], ANY_TOKEN, tl.int32))
        record = tl.load(line_ptr + 6)
        allowed = tl.load(line_ptr + 7)
        line_ptr += LINE_HEADER
        copy_numbers(line_ptr, record_ptr + row * RECORD_SIZE, record, part, parts, BLOCK)
        copy_numbers(line_ptr + record, allowed_ptr + row * tl.cdiv(VOCAB, WORD_BITS), allowed, part, parts, BLOCK)
        if (flags & PENALTIES) != 0:
            for first in range(part * BLOCK, VOCAB, parts * BLOCK):
                at = first + tl.arange(0, BLOCK)
                tl.store(counts_ptr + row * VOCAB + at, tl.zeros([BLOCK], tl.int32), mask=at < VOCAB)


@triton.jit(do_not_specialize=["tokens"])
def count_kernel(
    tokens_ptr,
    token_rows_ptr,
    positions_ptr,
    flags_ptr,
    prompt_len_ptr,
    counts_ptr,
    last_ptr,
    tokens,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    follow(DEPENDENT)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens
    row = tl.load(token_rows_ptr + at, mask=inside, other=0)
    flags = tl.load(flags_ptr + row, mask=inside, other=0)
    token = tl.load(tokens_ptr + at, mask=flags != 0, other=-1)
    known = (token >= 0) & (token < VOCAB)
    position = tl.load(positions_ptr + at, mask=known, other=0)
    count_ptr = counts_ptr + row.to(tl.int64) * VOCAB + token
    penalised = known & ((flags & PENALTIES) != 0)
    prompt_len = tl.load(prompt_len_ptr + row, mask=penalised, other=0)
    tl.atomic_or(count_ptr, IN_PROMPT, mask=penalised & (position < prompt_len), sem="relaxed")
    tl.atomic_add(count_ptr, 1, mask=penalised & (position >= prompt_len), sem="relaxed")
    # of a long chunk only the latest tokens, which have a place each
    later_row = tl.load(token_rows_ptr + at + HISTORY, mask=at + HISTORY < tokens, other=-1)
    newest = known & ((flags & BAD_WORDS) != 0) & (later_row != row)
    tl.store(last_ptr + row.to(tl.int64) * HISTORY + position % HISTORY, token, mask=newest)


@triton.jit
def allowed_bits(mask_ptr, index, inside):
    """Whether each token's bit is set; not, where `inside` is false."""
    word = tl.load(mask_ptr + index // WORD_BITS, mask=inside, other=0)
    return ((word >> (index % WORD_BITS)) & 1) != 0


@triton.jit
def penalise(x, count, repetition, presence, frequency):
    repeated = tl.where(x < 0.0, x * repetition, tl.div_rn(x, repetition))
    x = tl.where(count != 0, repeated, x)
    generated = count & (IN_PROMPT - 1)
    return tl.where(generated > 0, x - generated.to(tl.float32) * frequency - presence, x)


@triton.jit
def step_mask(flags, mask_index_ptr, entry, HAS_MASKS: tl.constexpr):
    """Whether a mask of the step holds for the entry, and its line: below 0 where there is none."""
    masked = (flags & MASKED) != 0
    line = 0 * entry - 1
    if HAS_MASKS:
        line = tl.load(mask_index_ptr + entry)
        masked = masked | (line >= 0)
    return masked, line


@triton.jit
def edit(
    x,
    index,
    row,
    flags,
    masked,
    line,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    counts_ptr,
    allowed_ptr,
    mask_ptr,
    masks,
    VOCAB: tl.constexpr,
):
    """Logits of tokens after all edits but those of the row's lists; `line` of `masks` in the step."""
    WORDS: tl.constexpr = (VOCAB + WORD_BITS - 1) // WORD_BITS
    inside = index < VOCAB
    if (flags & PENALTIES) != 0:
        count = tl.load(counts_ptr + row * VOCAB + index, mask=inside, other=0)
        repetition = tl.load(repetition_ptr + row)
        x = penalise(x, count, repetition, tl.load(presence_ptr + row), tl.load(frequency_ptr + row))
    if (flags & ALLOWED) != 0:
        x = tl.where(allowed_bits(allowed_ptr + row * WORDS, index, inside), x, float("-inf"))
    if masked:
        there = (line >= 0) & (line < masks)
        line_ptr = mask_ptr + tl.where(there, line, 0).to(tl.int64) * WORDS
        x = tl.where(allowed_bits(line_ptr, index, index < tl.where(there, VOCAB, 0)), x, float("-inf"))
    return x


@triton.jit
def add_biases(ids_ptr, count, edited_ptr, begin, end):
    """To the tokens from `begin` to before `end`."""
    for first in range(0, count, LIST_BLOCK):
        place = first + tl.arange(0, LIST_BLOCK)
        token = tl.load(ids_ptr + place, mask=place < count, other=-1)
        here = (token >= begin) & (token < end)
        bias = tl.load(ids_ptr + count + place, mask=here, other=0).to(tl.float32, bitcast=True)
        x = tl.load(edited_ptr + token, mask=here, other=0.0)
        tl.store(edited_ptr + token, x + bias, mask=here)


@triton.jit
def ban_tokens(ids_ptr, count, edited_ptr, position, begin, end):
    for first in range(0, count, LIST_BLOCK):
        place = first + tl.arange(0, LIST_BLOCK)
        token = tl.load(ids_ptr + place, mask=place < count, other=-1)
        first_position = tl.load(ids_ptr + count + place, mask=place < count, other=0)
        here = (token >= begin) & (token < end) & (position < first_position)
        tl.store(edited_ptr + token, tl.full([LIST_BLOCK], float("-inf"), tl.float32), mask=here)


@triton.jit
def ban_bad_words(words_ptr, count, last_ptr, edited_ptr, position, begin, end):
    """-inf for the last tokens of the sequences whose other tokens are the row's latest."""
    back_H = tl.arange(0, HISTORY)
    latest_H = tl.load(last_ptr + ((position - back_H) & (HISTORY - 1)))
    for first in range(0, count, WORDS_BLOCK):
        place = first + tl.arange(0, WORDS_BLOCK)
        inside = place < count
        word_NH = tl.load(words_ptr + place[:, None] * HISTORY + back_H[None, :], mask=inside[:, None], other=ANY_TOKEN)
        fits_NH = (word_NH == latest_H[None, :]) | (word_NH == ANY_TOKEN) | (back_H == 0)[None, :]
        fits = tl.min(fits_NH.to(tl.int32), axis=1) != 0
        token = tl.load(words_ptr + place * HISTORY, mask=inside, other=-1)
        here = fits & (token >= begin) & (token < end)
        tl.store(edited_ptr + token, tl.full([WORDS_BLOCK], float("-inf"), tl.float32), mask=here)


@triton.jit(do_not_specialize=["masks"])
def edit_kernel(
    logits_ptr,
    logits_stride,
    edited_ptr,
    where_ptr,
    rows_ptr,
    flags_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    counts_ptr,
    allowed_ptr,
    mask_ptr,
    mask_index_ptr,
    masks,
    positions_ptr,
    last_ptr,
    record_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    LISTS_ONLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """All edits of an entry. LISTS_ONLY leaves entries without lists to who reads them, and says so."""
    follow(DEPENDENT)
    entry = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.load(rows_ptr + entry).to(tl.int64)
    flags = tl.load(flags_ptr + row)
    masked, line = step_mask(flags, mask_index_ptr, entry, HAS_MASKS)
    edits = ((flags & EDITS) != 0) | masked
    here = edits
    where = tl.where(edits, BESIDE, AS_THEY_ARE)
    if LISTS_ONLY:
        here = (flags & LISTS) != 0
        where = tl.where(edits & (here == 0), IN_PASSING, where)
    if part == 0:
        tl.store(where_ptr + entry, where)
    if here:
        SHARES: tl.constexpr = (VOCAB + BLOCK - 1) // BLOCK
        row_ptr = logits_ptr + entry.to(tl.int64) * logits_stride
        edited_ptr += entry.to(tl.int64) * VOCAB
        span = tl.cdiv(SHARES, tl.num_programs(1))
        first = part * span
        last = tl.minimum(first + span, SHARES)
        for tile in range(first, last):
            index = tile * BLOCK + tl.arange(0, BLOCK)
            x = edit(
                load_tile((row_ptr,), tile, VOCAB, BLOCK, LARGEST),
                index,
                row,
                flags,
                masked,
                line,
                repetition_ptr,
                presence_ptr,
                frequency_ptr,
                counts_ptr,
                allowed_ptr,
                mask_ptr,
                masks,
                VOCAB,
            )
            tl.store(edited_ptr + index, x, mask=index < VOCAB)
        if (flags & LISTS) != 0:
            begin = first * BLOCK
            end = tl.minimum(last * BLOCK, VOCAB)
            record_ptr += row * RECORD_SIZE
            biases = tl.load(record_ptr)
            bans = tl.load(record_ptr + 1)
            words = tl.load(record_ptr + 2)
            lists_ptr = record_ptr + RECORD_HEADER
            tl.debug_barrier()  # the span is stored before other threads of this program read or write it
            add_biases(lists_ptr, biases, edited_ptr, begin, end)
            tl.debug_barrier()  # a ban comes after a bias of the same token
            lists_ptr += 2 * biases
            position = tl.load(positions_ptr + entry)
            ban_tokens(lists_ptr, bans, edited_ptr, position, begin, end)
            lists_ptr += 2 * bans
            ban_bad_words(lists_ptr, words, last_ptr + row * HISTORY, edited_ptr, position, begin, end)
