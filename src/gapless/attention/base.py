"""The contract between a model and an attention backend: paged KV cache, any mix of prefill chunks and decode rows.

Letters that end a tensor's name give its shape:
    T  tokens of the step, all entries one after the other
    E  entries of the batch: one sequence's part of the step
    R  rows of the device tables; the last row is scratch, for padding
    C  columns of the block table: KV blocks of one sequence
    B  KV blocks of the cache; block 0 is never allocated and takes the writes of padding
    S  tokens in a block
    N  query heads, K key/value heads, D head size
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Which tokens this step computes and which KV they see.

    Entries with exactly one query token come first (`num_decodes` of them), then those with more. Padding is decodes of
    the scratch row, entries with no token at the end, and tokens of no entry behind them: what these get is undefined.
    A query token at position p of its sequence sees positions 0..p, its own included.
    The integers are known on the host and are constants inside a graph; the tensors are not.
    """

    rows_E: Tensor  # int32: table row of each entry
    query_start_E1: Tensor  # int32[E + 1]: first token of each entry, then the number of tokens that entries have
    kv_len_E: Tensor  # int32: tokens of the sequence once this step has been appended
    token_rows_T: Tensor  # int32: table row of each token
    positions_T: Tensor  # int32: position of each token in its sequence
    block_table_RC: Tensor  # int32: KV block of each span of S positions; columns past the length hold anything valid
    num_decodes: int
    max_query: int  # no entry has more query tokens
    max_kv: int  # no entry has a larger kv_len


@dataclass(frozen=True, slots=True)
class HeadRotation:
    """What becomes of the heads of q and k before they meet: RMSNorm where there are weights, then rotation."""

    qk_norm_2D: Tensor | None  # row 0 for queries, row 1 for keys
    eps: float
    rope_PD: Tensor  # float32 [positions, D]: cosines of the D/2 angles, then sines


@dataclass(frozen=True, slots=True)
class LayerKV:
    """The KV cache of one layer. Token t of block b, head k lies at [b, k, t].

    Both tensors are contiguous. The layout is part of the contract: fused kernels outside a backend write it too.
    Memory that no token was written to may hold NaN.
    """

    k_BKSD: Tensor
    v_BKSD: Tensor

    @property
    def block_size(self) -> int:
        return self.k_BKSD.shape[2]


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What one token costs in the cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def bytes_per_block(self, block_size: int, dtype: torch.dtype) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * block_size * dtype.itemsize

    def allocate(self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> list[LayerKV]:
        """The cache of every layer, in one zeroed allocation; on the CPU, pages cost memory only once written."""
        shape = (self.num_layers, 2, num_blocks, self.num_kv_heads, block_size, self.head_dim)
        if device.type == "cpu":
            zeroed = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
            whole = torch.from_numpy(zeroed).view(dtype).view(shape)
        else:
            whole = torch.zeros(shape, dtype=dtype, device=device)
        return [LayerKV(layer[0], layer[1]) for layer in whole.unbind(0)]


def cache_lines(kv: LayerKV, batch: AttentionBatch) -> Tensor:
    """int64[T * K]: for each token and head, its line of the cache seen as [B * K * S, D]. Equal in every layer."""
    num_heads, block_size = kv.k_BKSD.shape[1], kv.block_size
    columns_T, offsets_T = batch.positions_T // block_size, batch.positions_T % block_size
    blocks_T = batch.block_table_RC[batch.token_rows_T, columns_T].long()
    heads_K = torch.arange(num_heads, device=blocks_T.device)
    return ((blocks_T.unsqueeze(1) * num_heads + heads_K) * block_size + offsets_T.unsqueeze(1)).flatten()


def write_lines(values_TKD: Tensor, cache_BKSD: Tensor, lines: Tensor) -> None:
    """Write each token's heads to their lines, from cache_lines."""
    head_dim = cache_BKSD.shape[3]
    cache_BKSD.view(-1, head_dim).index_copy_(0, lines, values_TKD.reshape(-1, head_dim))


def append_kv(k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, batch: AttentionBatch) -> None:
    """Write each token's key and value to its place in the cache: `AttentionBackend.append` in plain torch."""
    lines = cache_lines(kv, batch)
    write_lines(k_TKD, kv.k_BKSD, lines)
    write_lines(v_TKD, kv.v_BKSD, lines)


class AttentionBackend(Protocol):
    """Stateless but for tuning tables; every method may be captured in a graph when all entries are decodes.

    captures_chunks  whether steps with chunks may be captured, too: nothing of their lengths is read on the host
    """

    name: str
    captures_chunks: bool

    def append(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, batch: AttentionBatch) -> None:
        """Write each token's key and value to its place in the cache. Inputs may be strided views.

        A model may also write them itself, fused with what comes before (`LayerKV` fixes the layout).
        """
        ...

    def attend(self, q_TND: Tensor, kv: LayerKV, batch: AttentionBatch, scale: float) -> Tensor:
        """Causal attention of the step's queries over the cache: contiguous [T, N, D] in q's dtype."""
        ...

    def rotate_and_attend(
        self, qkv_TM: Tensor, rotation: HeadRotation, kv: LayerKV, batch: AttentionBatch, scale: float
    ) -> Tensor | None:
        """Norm and rotate q and k, append k and v, and attend, from the contiguous product of q, k and v, in one.

        None, and nothing done, where the backend has no such kernel for this batch.
        """
        ...
