"""Sequences, ways to cut them into steps, and what a model makes of them: to compare bits."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gapless.attention.base import LayerKV
from gapless.attention.scenario import batch_of, shuffled_block_table
from gapless.models.base import Model

BLOCK_SIZE = 16
LENGTHS = [70, 33, 17, 1, 50, 16, 64, 95, *[2 + index % 5 for index in range(24)]]
PREFIX = 48  # tokens that the sequences 0 and 7 begin with
Step = Sequence[tuple[int, int]]  # (row, tokens), entries with one token first; row -1 is padding


@dataclass(frozen=True)
class Schedule:
    """cached: for a row, the row whose blocks it shares and how many tokens of them."""

    steps: list[Step]
    cached: Mapping[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])


def random_tokens(vocab: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    sequences = [torch.randint(vocab, (length,), generator=generator) for length in LENGTHS]
    sequences[7][:PREFIX] = sequences[0][:PREFIX]
    return sequences


def logits_of(
    model: Model,
    sequences: Sequence[Tensor],
    schedule: Schedule,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Of each sequence the logits of the tokens that it computed itself. The cache is poisoned before."""
    rows, columns = len(sequences), -(-max(map(len, sequences)) // BLOCK_SIZE)
    table_RC = shuffled_block_table(rows, columns, torch.Generator().manual_seed(0), torch.device("cpu"))
    done, parts = [0] * rows, [list[Tensor]() for _ in sequences]
    for row, (source, tokens) in schedule.cached.items():
        table_RC[row, : tokens // BLOCK_SIZE] = table_RC[source, : tokens // BLOCK_SIZE]
        done[row] = tokens
    layers = model.kv_spec.allocate(rows * columns + 1, BLOCK_SIZE, dtype, device)
    kv = [LayerKV(layer.k_BKSD.fill_(torch.nan), layer.v_BKSD.fill_(torch.nan)) for layer in layers]
    table_RC = table_RC.to(device)
    for step in schedule.steps:
        tokens, lengths = list[Tensor](), list[int]()
        for row, count in step:
            tokens.append(sequences[row][done[row] : done[row] + count] if row >= 0 else torch.zeros(1).long())
            if row >= 0:
                done[row] += count
            lengths.append(done[row] if row >= 0 else 1)
        counts = [count for _, count in step]
        batch = batch_of([row % (rows + 1) for row, _ in step], counts, lengths, table_RC)
        with torch.inference_mode():
            logits_TV = model.logits(model.forward(torch.cat(tokens).to(batch.rows_E), kv, batch))
        for (row, _), part in zip(step, logits_TV.cpu().split(counts), strict=True):
            if row >= 0:
                parts[row].append(part)
    return [torch.cat(part) for part in parts]


def alone(length: int) -> Schedule:
    """One sequence, a token at a time."""
    return Schedule([[(0, 1)]] * length)


def _in_chunks(size: int, done: Mapping[int, int] | None = None) -> Iterator[Step]:
    """All sequences at once, at most `size` tokens of each in a step."""
    left = {row: length - (done or {}).get(row, 0) for row, length in enumerate(LENGTHS)}
    while left := {row: count for row, count in left.items() if count}:
        yield sorted(((row, min(size, count)) for row, count in left.items()), key=lambda entry: entry[1] > 1)
        left = {row: count - min(size, count) for row, count in left.items()}


def _at_random(seed: int) -> Iterator[Step]:
    """Some sequences in each step, in any order, cut anywhere, padding between the decodes."""
    rng = random.Random(seed)
    left = dict(enumerate(LENGTHS))
    while left := {row: count for row, count in left.items() if count}:
        some = rng.sample(list(left), rng.randint(1, len(left)))
        step = [(row, min(left[row], rng.choice([1, 1, 2, 5, 16, 31, 80]))) for row in some]
        for row, count in step:
            left[row] -= count
        step += [(-1, 1)] * rng.randint(0, 3)
        rng.shuffle(step)
        yield sorted(step, key=lambda entry: entry[1] > 1)


SCHEDULES = {
    "whole": Schedule(list(_in_chunks(max(LENGTHS)))),
    "decodes together": Schedule(list(_in_chunks(1))),
    **{f"chunks of {size}": Schedule(list(_in_chunks(size))) for size in (2, 7, 16, 33)},
    **{f"at random, {seed}": Schedule(list(_at_random(seed))) for seed in range(6)},
    "a prefix that is in the cache": Schedule(
        [[(0, LENGTHS[0])], *([entry for entry in step if entry[0]] for step in _in_chunks(29, {7: PREFIX}))],
        cached={7: (0, PREFIX)},
    ),
}
