"""A model whose next token is a hash of its whole prefix, read back through the paged KV cache.

One wrong, missing, stale or repeated token anywhere in a prefix changes every token after it, so comparing token ids
is an exact test of scheduling, block tables, carry-over and buffers. Arithmetic is in integers: no rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, KVSpec, LayerKV

VOCAB = 61
EOS = 0
_PRIME = 2_147_483_629
_STRIDE = 1_000_003
_SPREAD = 7919
_LEVELS = 9973


def position_weights(length: int) -> Tensor:
    """One factor per position, so that the hash depends on the order."""
    positions = torch.arange(1, length + 1, dtype=torch.int64)
    return (positions * _STRIDE + positions * positions * 97) % _PRIME


def prefix_hash(tokens: Sequence[int]) -> int:
    """The hash of a whole prefix in plain integers: what the model must find in its cache."""
    factors = position_weights(len(tokens)).tolist()
    return sum((token + 1) * factor % _PRIME for token, factor in zip(tokens, factors, strict=True)) % _PRIME


def scores(hashes_E: Tensor) -> Tensor:
    """Scattered scores [E, VOCAB] from hashes, int64 in 0 to _LEVELS - 1."""
    tokens_V = torch.arange(1, VOCAB + 1, dtype=torch.int64, device=hashes_E.device)
    mixed_EV = (hashes_E[:, None] % 1_000_003) * (tokens_V * _SPREAD) + hashes_E[:, None] // 7
    return (mixed_EV ^ (mixed_EV >> 13)) % _LEVELS


def next_token(tokens: Sequence[int]) -> int:
    """The greedy continuation of a prefix, with no engine involved."""
    return int(scores(torch.tensor([prefix_hash(tokens)]))[0].argmax())


def expected_tokens(prompt: Sequence[int], max_length: int, stop_ids: Sequence[int]) -> list[int]:
    """The whole greedy answer of a request, stop token included."""
    tokens = list(prompt)
    while len(tokens) < max_length:
        tokens.append(next_token(tokens))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


class HashModel:
    """Implements models.base.Model. The K cache holds token ids, the V cache positions; both are checked by hashing."""

    vocab_size = VOCAB
    eos_token_ids: tuple[int, ...] = (EOS,)
    kv_spec = KVSpec(num_layers=1, num_kv_heads=1, head_dim=1)
    dtype = torch.float32

    def __init__(self, max_position: int = 128, device: torch.device | None = None) -> None:
        self.max_position = max_position
        self._weights_L = position_weights(max_position).to(device or torch.device("cpu"))

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        cache, size = kv[0], kv[0].block_size
        rows_T, positions_T = batch.token_rows_T.long(), batch.positions_T.long()
        table_TC = batch.block_table_RC[rows_T].long()
        blocks_T = table_TC.gather(1, (positions_T // size)[:, None])[:, 0]
        cache.k_BKSD[blocks_T, 0, positions_T % size, 0] = tokens_T.float()
        cache.v_BKSD[blocks_T, 0, positions_T % size, 0] = positions_T.float()
        length = min(batch.max_kv, table_TC.shape[1] * size, self.max_position)
        columns = -(-length // size)
        seen_TL = cache.k_BKSD[table_TC[:, :columns], 0, :, 0].flatten(1)[:, :length].double()
        where_TL = cache.v_BKSD[table_TC[:, :columns], 0, :, 0].flatten(1)[:, :length].double()
        at_L = torch.arange(length, device=tokens_T.device)
        valid_TL = at_L <= positions_T[:, None]
        misplaced_TL = valid_TL & (where_TL != at_L)
        terms_TL = (seen_TL.nan_to_num(-7.0).long() + 1) * self._weights_L[:length] % _PRIME
        hashes_T = (terms_TL * valid_TL).sum(1) % _PRIME + misplaced_TL.sum(1) * 12_345
        return hashes_T[:, None]

    def logits(self, hidden_EH: Tensor) -> Tensor:
        return scores(hidden_EH[:, 0]).float() / 1000.0
