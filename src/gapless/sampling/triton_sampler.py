"""The sampler as three small Triton kernels: any mix of greedy, random and filtered rows, no sort.

    extremes_kernel  a program per entry and tile of the vocabulary: largest and smallest logit of the tile
    mass_kernel      the same grid: mass of the tile, for random rows without top_k
    choose_kernel    a program per entry: thresholds where the row has filters, then the token

They branch per row on the device, allocate only scratch and output (in the graph's pool, under capture) and never
wait, so one captured graph serves any mix of parameters. They choose the same tokens as TorchSampler, bit for bit:
masses are integers, and they are compiled without fused multiply-add. Needs only torch and Triton; NVIDIA and AMD.

E entries, V vocabulary, T tiles of the vocabulary, rounded up to a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from gapless.kernels.dependent import dependent_launch
from gapless.sampling import triton_kernels
from gapless.sampling.base import SamplingTables, check_logits

_kernels: Any = triton_kernels  # Triton's functions are launched with values where their signatures say constexpr
MIN_BLOCK = 16
_LOW_ZERO_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


def low_zero_bits(dtype: torch.dtype) -> int:
    """How many low bits of a value of this type are zero once it is widened to fp32."""
    return _LOW_ZERO_BITS[dtype]


def block_for(vocab: int, largest: int) -> int:
    """Elements of a tile: a power of two that makes at least two tiles, since Triton 3.6 can not compile for one."""
    return min(largest, max(MIN_BLOCK, triton.next_power_of_2(vocab) // 2))


class TritonSampler:
    """Safe under graphs. A tile of the vocabulary has `block` elements, a power of two."""

    def __init__(self, block: int = 4096, tile_warps: int = 8, choose_warps: int = 16) -> None:
        self.block = block
        self.tile_warps = tile_warps
        self.choose_warps = choose_warps

    def sample(
        self, logits_EV: Tensor, rows_E: Tensor, positions_E: Tensor, tables: SamplingTables, *, all_greedy: bool
    ) -> Tensor:
        check_logits(logits_EV)
        entries, vocab = logits_EV.shape
        device = logits_EV.device
        tokens_E = torch.empty(entries, dtype=torch.int32, device=device)
        if entries == 0:
            return tokens_E
        block = block_for(vocab, self.block)
        tiles = triton.cdiv(vocab, block)
        padded_tiles = triton.next_power_of_2(tiles)
        best_ET = torch.empty(entries, padded_tiles, dtype=torch.float32, device=device)
        worst_ET = torch.empty_like(best_ET)
        token_ET = torch.empty_like(best_ET, dtype=torch.int32)
        mass_ET = torch.empty_like(best_ET, dtype=torch.int64)
        buffer_EB = torch.empty(entries, block, dtype=torch.float32, device=device)
        logits = (logits_EV, logits_EV.stride(0))
        shape = {"VOCAB": vocab, "BLOCK": block, "TILES": padded_tiles, "LARGEST": torch.finfo(logits_EV.dtype).max}
        shape.update(dependent_launch())
        tile_options = {"num_warps": self.tile_warps, "enable_fp_fusion": False}
        choose_options = {"num_warps": self.choose_warps, "enable_fp_fusion": False}
        filters = (tables.temperature_R, tables.top_k_R, tables.top_p_R, tables.min_p_R)

        _kernels.extremes_kernel[(entries, tiles)](*logits, best_ET, worst_ET, token_ET, **shape, **tile_options)
        _kernels.mass_kernel[(entries, tiles)](*logits, rows_E, *filters, best_ET, mass_ET, **shape, **tile_options)
        _kernels.choose_kernel[(entries,)](
            *logits,
            rows_E,
            *filters,
            best_ET,
            mass_ET,
            worst_ET,
            token_ET,
            positions_E,
            tables.seed_R2,
            buffer_EB,
            tokens_E,
            **shape,
            LOW_ZERO_BITS=low_zero_bits(logits_EV.dtype),
            **choose_options,
        )
        return tokens_E
