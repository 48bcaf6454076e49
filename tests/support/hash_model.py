"""A model whose next token is a hash of its whole prefix, read back through the paged KV cache.

One wrong, missing, stale or repeated token anywhere in a prefix changes every token after it, so comparing token ids
is an exact test of scheduling, block tables, carry-over and buffers. Arithmetic is in integers: no rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, KVSpec, LayerKV, append_kv

VOCAB = 61
EOS = 0
MISPLACED = 12_345  # is added to the hash for each cached token that is not the one of its position
NOT_COMPUTED = 54_321  # stands for the hash of a token that attention leaves out
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


def logits_of(hashes_E: Tensor) -> Tensor:
    """The same as logits, float32, from -5 to 5."""
    return (scores(hashes_E) - _LEVELS // 2).float() / 1000.0


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
    """Implements models.base.Model. The K cache holds token ids, the V cache positions; both are checked by hashing.

    It reads the cache as the attention backends do: decodes by their place, all else by query_start, rows by rows_E,
    lengths by kv_len_E, and nothing beyond max_query and max_kv.
    """

    vocab_size = VOCAB
    eos_token_ids: tuple[int, ...] = (EOS,)
    kv_spec = KVSpec(num_layers=1, num_kv_heads=1, head_dim=1)
    num_weights = 0
    captures_chunks = True
    dtype = torch.float32

    def __init__(self, max_position: int = 128, device: torch.device | None = None) -> None:
        self.max_position = max_position
        self._weights_L = position_weights(max_position).to(device or torch.device("cpu"))

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        cache, starts_E1 = kv[0], batch.query_start_E1
        append_kv(tokens_T.float().view(-1, 1, 1), batch.positions_T.float().view(-1, 1, 1), cache, batch)
        token_T = torch.arange(tokens_T.numel(), dtype=torch.int32, device=tokens_T.device)
        decode_T = token_T < batch.num_decodes
        chunk_T = batch.num_decodes + (token_T[:, None] >= starts_E1[batch.num_decodes + 1 :]).sum(1)
        entry_T = torch.where(decode_T, token_T, chunk_T).clamp_(max=batch.rows_E.numel() - 1)
        before_T = (token_T - starts_E1[entry_T]).masked_fill_(decode_T, 0)
        behind_T = (starts_E1[entry_T + 1] - 1 - token_T).masked_fill_(decode_T, 0)
        length_T = batch.kv_len_E[entry_T] - behind_T
        table_TC = batch.block_table_RC[batch.rows_E[entry_T]]
        longest = min(batch.max_kv, table_TC.shape[1] * cache.block_size, self.max_position)
        table_TC = table_TC[:, : -(-longest // cache.block_size)]
        seen_TL = cache.k_BKSD[table_TC, 0, :, 0].flatten(1)[:, :longest].double()
        where_TL = cache.v_BKSD[table_TC, 0, :, 0].flatten(1)[:, :longest].double()
        at_L = torch.arange(longest, device=tokens_T.device)
        valid_TL = at_L < length_T[:, None]
        terms_TL = (seen_TL.nan_to_num(-7.0).long() + 1) * self._weights_L[:longest] % _PRIME
        misplaced_T = (valid_TL & (where_TL != at_L)).sum(1)
        hashes_T = (terms_TL * valid_TL).sum(1) % _PRIME + misplaced_T * MISPLACED
        return hashes_T.masked_fill_((before_T >= batch.max_query) & ~decode_T, NOT_COMPUTED)[:, None]

    def prepare(
        self,
        batch_sizes: Sequence[int],
        seconds_of: Callable[[Callable[[], object]], float],
        *,
        also: Sequence[int] = (),
    ) -> None:
        """There is nothing to choose."""

    def tensors(self) -> Iterable[Tensor]:
        return ()

    def check_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """It has none."""

    def update_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """It has none."""

    def logits(self, hidden_EH: Tensor) -> Tensor:
        return logits_of(hidden_EH[:, 0])
