"""Random features of rows, and steps that feed their tokens, for the reference's tests and for the kernels'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapless.sampling.features import FeatureTables, StepMasks
from gapless.sampling.records import RowFeatures, bit_mask, pack_lines

Ints = NDArray[np.int32]
MASKED_AWAY = 4  # an index past the masks of a step


def random_history(rng: np.random.Generator, vocab: int) -> Ints:
    """Tokens so far: few kinds, so that they repeat."""
    kinds = rng.integers(0, vocab, rng.integers(1, 12))
    return rng.choice(kinds, rng.integers(1, 60)).astype(np.int32)


def random_features(rng: np.random.Generator, vocab: int, history: Ints) -> RowFeatures:
    """Each feature with some probability, none in one of three rows; bad words that do and do not end the history."""
    row = RowFeatures(prompt_len=int(rng.integers(0, len(history) + 1)))
    if rng.random() < 1 / 3:
        return row

    def ids(most: int) -> list[int]:
        return rng.choice(vocab, rng.integers(1, min(most, vocab) + 1), replace=False).tolist()

    if rng.random() < 0.5:
        row = replace(row, repetition=float(rng.choice([0.5, 1.0, 1.1, 1.7])))
    if rng.random() < 0.5:
        row = replace(row, presence=float(rng.choice([0.0, 0.3, -1.1])), frequency=float(rng.choice([0.0, 0.7, -0.2])))
    lists = rng.random() < 0.5  # without any, the sampler's first pass makes the edits
    if lists and rng.random() < 0.7:
        row = replace(row, bias={token: float(rng.normal(0, 5)) for token in ids(300)})
    if lists and rng.random() < 0.7:
        row = replace(row, bans={token: len(history) + int(rng.integers(-1, 3)) for token in ids(70)})
    if lists and rng.random() < 0.7:
        words = [history[len(history) - n :].tolist() for n in rng.integers(0, min(len(history), 15) + 1, 3)]
        words += [rng.integers(0, vocab, rng.integers(0, 16)).tolist() for _ in range(40)]
        row = replace(row, bad_words=[[*word, int(rng.integers(vocab))] for word in words])
    if rng.random() < 0.3:
        row = replace(row, allowed=ids(vocab))
    if rng.random() < 0.3:
        row = replace(row, masked=True)
    if rng.random() < 0.3:
        row = replace(row, num_logprobs=int(rng.integers(0, 21)))
    return row


@dataclass(frozen=True)
class Step:
    """What one step feeds, on the device: int32[T] each."""

    tokens_T: Tensor
    rows_T: Tensor
    positions_T: Tensor


def steps_of(rng: np.random.Generator, histories: list[Ints]) -> Iterator[Step]:
    """The rows' tokens in chunks, rows in any order, with padding on the scratch row behind the last."""
    fed = [0] * len(histories)
    while any(done < len(history) for done, history in zip(fed, histories, strict=True)):
        parts: list[tuple[Ints, int, int]] = []
        for row in rng.permutation(len(histories)):
            count = int(min(rng.choice([0, 1, 1, 5, 40]), len(histories[row]) - fed[row]))
            parts.append((histories[row][fed[row] : fed[row] + count], int(row), fed[row]))
            fed[row] += count
        padding = int(rng.integers(0, 3))
        parts += [(np.zeros(1, np.int32), len(histories), 0)] * padding
        yield Step(
            torch.from_numpy(np.concatenate([tokens for tokens, _, _ in parts])),
            torch.from_numpy(np.concatenate([np.full(tokens.size, row, np.int32) for tokens, row, _ in parts])),
            torch.from_numpy(
                np.concatenate([np.arange(at, at + tokens.size, dtype=np.int32) for tokens, _, at in parts])
            ),
        )


@dataclass(frozen=True)
class Case:
    """Rows with their features and histories, in tables that held other rows before."""

    vocab: int
    features: list[RowFeatures]
    histories: list[Ints]

    @classmethod
    def random(cls, rng: np.random.Generator, rows: int, vocab: int) -> Case:
        histories = [random_history(rng, vocab) for _ in range(rows)]
        return cls(vocab, [random_features(rng, vocab, history) for history in histories], histories)

    @property
    def rows_E(self) -> Tensor:  # noqa: N802
        return torch.arange(len(self.features), dtype=torch.int32)

    @property
    def positions_E(self) -> Tensor:  # noqa: N802
        """Of the tokens to sample."""
        return torch.tensor([len(history) for history in self.histories], dtype=torch.int32)

    def tables(self, rng: np.random.Generator, device: Any, module: Any) -> FeatureTables:
        """Tables as `module` (torch_features or triton_features) makes them from the steps of these rows."""
        rows = len(self.features)
        tables = FeatureTables.allocate(rows + 1, self.vocab, torch.device(device))
        for name, table in tables.by_name():
            if name not in ("feature flags", "logprobs"):
                table.fill_(3)  # stale
        begins_A1, lines_P = pack_lines([*(row.line(self.vocab) for row in self.features), bit_mask([], 1)[:0]])
        rows_A = torch.arange(rows + 1, dtype=torch.int32)
        sent = (rows_A, torch.from_numpy(begins_A1), torch.from_numpy(lines_P))
        module.take_rows(*(each.to(device) for each in sent), tables)
        for step in steps_of(rng, self.histories):
            fed = (step.tokens_T, step.rows_T, step.positions_T)
            module.count_tokens(*(each.to(device) for each in fed), tables)
        return tables

    def masks(self, rng: np.random.Generator, device: Any) -> StepMasks:
        """A mask for most of the masked rows and for some others."""
        lines = [bit_mask(np.flatnonzero(rng.random(self.vocab) < 0.5).astype(np.int32), self.vocab) for _ in range(3)]
        index_E = [
            int(rng.choice([-1, 0, 1, 2, MASKED_AWAY])) if row.masked else int(rng.choice([-1, -1, 0]))
            for row in self.features
        ]
        mask_MW = torch.from_numpy(np.stack(lines))
        return StepMasks(mask_MW.to(device), torch.tensor(index_E, dtype=torch.int32, device=device))


def random_logits(rng: np.random.Generator, entries: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """Random, with ties, with the values that are cleaned."""
    logits_EV = torch.from_numpy(rng.normal(0, 4, (entries, vocab)).astype(np.float32))
    logits_EV[0] = logits_EV[0].round()
    if entries > 5:
        logits_EV[1] = -torch.inf
        logits_EV[2, ::3] = torch.nan
        logits_EV[3, vocab // 2] = torch.inf
        logits_EV[4, ::2] = -torch.inf
    return logits_EV.to(dtype)
