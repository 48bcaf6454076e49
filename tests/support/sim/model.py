"""The hash model and a sampler in numpy, several times faster on tiny batches.

The sampler mixes every score and every sampling parameter of the row into the token that it draws, so one that is stale
or belongs to another request changes the token, which real sampling would often hide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.sampling.base import SamplingTables
from gapless.sampling.features import FeatureTables, StepMasks
from gapless.sampling.torch_features import edit_logits
from support.hash_model import MISPLACED, NOT_COMPUTED, VOCAB, HashModel, position_weights

SHIFT = 64  # the model reads token t as t + SHIFT * weights
_PRIME = 2_147_483_629
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_MAX_LENGTH = 256
_AT = np.arange(_MAX_LENGTH)
_WEIGHTS: NDArray[np.int64] = position_weights(_MAX_LENGTH).numpy()
_SCORE_WEIGHTS = (2 * np.arange(VOCAB, dtype=np.uint64) + np.uint64(1)) * _MIX


class KeyedHashModel(HashModel):
    """A hash model whose weights are one number: other weights give other tokens, and make all that is cached wrong."""

    def __init__(self) -> None:
        super().__init__(_MAX_LENGTH)
        self.key_1 = torch.zeros(1, dtype=torch.int64)

    def tensors(self) -> Iterable[Tensor]:
        return (self.key_1,)

    def update_weights(self, tensors: Mapping[str, Tensor]) -> None:
        self.key_1.copy_(tensors["key"])

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        return super().forward(tokens_T + SHIFT * self.key_1, kv, batch)


class NumpyHashModel(KeyedHashModel):
    """The same in numpy."""

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        keys_BS = kv[0].k_BKSD.numpy()[:, 0, :, 0]
        values_BS = kv[0].v_BKSD.numpy()[:, 0, :, 0]
        size = keys_BS.shape[1]
        table_RC = batch.block_table_RC.numpy()
        positions_T = batch.positions_T.numpy()
        blocks_T = table_RC[batch.token_rows_T.numpy(), positions_T // size]
        keys_BS[blocks_T, positions_T % size] = tokens_T.numpy().astype(np.int64) + SHIFT * int(self.key_1)
        values_BS[blocks_T, positions_T % size] = positions_T
        starts_E1 = batch.query_start_E1.numpy()
        decodes = min(batch.num_decodes, starts_E1.size - 1)
        length = min(batch.max_kv, table_RC.shape[1] * size)
        table_EC = table_RC[batch.rows_E.numpy(), : -(-length // size)]
        seen_EL = keys_BS[table_EC].reshape(starts_E1.size - 1, -1)[:, :length]
        where_EL = values_BS[table_EC].reshape(starts_E1.size - 1, -1)[:, :length]
        tokens_EL = np.where(np.isfinite(seen_EL), seen_EL, -7.0).astype(np.int64)
        hashes_EN = _sums((tokens_EL + 1) * _WEIGHTS[:length] % _PRIME)
        misplaced_EN = _sums(where_EL != _AT[:length])
        hidden_TH = np.full((positions_T.size, 1), NOT_COMPUTED, dtype=np.int64)
        lengths_E = batch.kv_len_E.numpy()
        for entry, (begin, end) in enumerate(zip(starts_E1[:-1].tolist(), starts_E1[1:].tolist(), strict=True)):
            begin, end = (entry, entry + 1) if entry < decodes else (begin, end)
            if end - begin > (1 if entry < decodes else batch.max_query):
                continue
            last = int(lengths_E[entry])
            at_T = np.clip(np.arange(last - (end - begin), last) + 1, 0, length)
            hidden_TH[begin:end, 0] = hashes_EN[entry, at_T] % _PRIME + misplaced_EN[entry, at_T] * MISPLACED
        return torch.from_numpy(hidden_TH)


def _sums(terms_EL: NDArray[np.integer]) -> NDArray[np.int64]:
    """[E, L + 1]: the sum of the first 0, 1, 2, ... terms."""
    sums_EN = np.zeros((terms_EL.shape[0], terms_EL.shape[1] + 1), dtype=np.int64)
    np.cumsum(terms_EL, axis=1, out=sums_EN[:, 1:])
    return sums_EN


def mixed(scores_EV: NDArray[np.float32], words: Sequence[NDArray[np.integer]]) -> NDArray[np.int64]:
    """Tokens from the scores and everything else that may make a difference: any that is not banned, 0 if all are."""
    bits_EV = (scores_EV + np.float32(0.0)).view(np.uint32).astype(np.uint64)
    with np.errstate(over="ignore"):
        z = (bits_EV * _SCORE_WEIGHTS).sum(axis=1) + _GOLDEN
        for word in words:
            z = (z ^ word.astype(np.int64).astype(np.uint64)) * _MIX
            z ^= z >> np.uint64(29)
    left_EV = np.isfinite(scores_EV)
    place_E = (z % np.maximum(left_EV.sum(axis=1), 1).astype(np.uint64)).astype(np.int64)
    return (left_EV.cumsum(axis=1) > place_E[:, None]).argmax(axis=1)


class MixSampler:
    """Implements sampling.base.Sampler, with an answer that depends on every parameter and every score."""

    def sample(
        self,
        logits_EV: Tensor,
        rows_E: Tensor,
        positions_E: Tensor,
        tables: SamplingTables,
        *,
        all_greedy: bool,
        features: FeatureTables | None = None,
        masks: StepMasks | None = None,
    ) -> Tensor:
        if features is not None:
            logits_EV = edit_logits(logits_EV, rows_E, positions_E, features, masks)
        scores_EV = logits_EV.numpy()
        greedy_E = scores_EV.argmax(1)
        if all_greedy:
            return torch.from_numpy(greedy_E.astype(np.int32))
        rows = rows_E.numpy()
        temperature_E = tables.temperature_R.numpy()[rows]
        seed_E2 = tables.seed_R2.numpy()[rows]
        words = [
            seed_E2[:, 0],
            seed_E2[:, 1],
            positions_E.numpy(),
            temperature_E.view(np.int32),
            tables.top_k_R.numpy()[rows],
            tables.top_p_R.numpy()[rows].view(np.int32),
            tables.min_p_R.numpy()[rows].view(np.int32),
        ]
        drawn_E = np.where(temperature_E == 0.0, greedy_E, mixed(scores_EV, words))
        return torch.from_numpy(drawn_E.astype(np.int32))
