"""Counter-based random numbers: Philox4x32-10 keyed on the request seed, counting positions.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

The number for (seed, position) is the 62 bits that the upper 31 bits of the first two output words make, for key =
seed and counter = (position, 0, 0, 0). 24 bits, what fp32 holds in [0, 1), would not do: a token of probability 1e-8
could then never be drawn, or be drawn at 6e-8, according to where it stands in the vocabulary. With 62 bits and
integer masses below 2**62 no token is off by more than 2**-62 of the total.

Three implementations agree bit for bit: numpy here (the reference), torch here, and Triton in triton_kernels.py.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNIFORM_BITS: Final = 62
ROUNDS: Final = 10
MULTIPLIER_0: Final = 0xD2511F53
MULTIPLIER_1: Final = 0xCD9E8D57
KEY_STEP_0: Final = 0x9E3779B9
KEY_STEP_1: Final = 0xBB67AE85

_WORD: Final = 0xFFFFFFFF
_HALF_BITS: Final = 31
_HALF: Final = 2**_HALF_BITS - 1


def philox_numpy(counter: NDArray[Any], key: NDArray[Any]) -> NDArray[np.uint32]:
    """Philox4x32-10 of counters [..., 4] under keys [..., 2], words of 32 bits; both broadcast. uint32[..., 4]."""
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    k0, k1 = np.moveaxis(np.asarray(key, dtype=np.uint64), -1, 0)
    word, shift = np.uint64(_WORD), np.uint64(32)
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * np.uint64(MULTIPLIER_0), c2 * np.uint64(MULTIPLIER_1)
        c0, c1, c2, c3 = (
            (product_1 >> shift) ^ c1 ^ k0,
            product_1 & word,
            (product_0 >> shift) ^ c3 ^ k1,
            product_0 & word,
        )
        k0, k1 = (k0 + np.uint64(KEY_STEP_0)) & word, (k1 + np.uint64(KEY_STEP_1)) & word
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def uniform_numpy(seeds: NDArray[np.uint64], positions: NDArray[Any]) -> NDArray[np.int64]:
    """The random integers of (seed, position), in [0, 2**62); the arguments broadcast."""
    seeds, positions = np.broadcast_arrays(np.asarray(seeds, dtype=np.uint64), np.asarray(positions, dtype=np.uint64))
    zeros = np.zeros_like(positions)
    key = np.stack([seeds & np.uint64(_WORD), seeds >> np.uint64(32)], axis=-1)
    words = philox_numpy(np.stack([positions, zeros, zeros, zeros], axis=-1), key).astype(np.int64)
    return ((words[..., 0] >> 1) << _HALF_BITS) | (words[..., 1] >> 1)


def uniform_torch(seeds_E2: Tensor, positions_E: Tensor) -> Tensor:
    """The same integers as int64[E] from int32 seed words (low, high), on any device.

    A product of two 32-bit words wraps in int64; masks and shifts recover its two words all the same.
    """
    k0, k1 = (seeds_E2.to(torch.int64) & _WORD).unbind(1)
    c0 = positions_E.to(torch.int64) & _WORD
    c1 = c2 = c3 = torch.zeros_like(c0)
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1 = ((product_1 >> 32) & _WORD) ^ c1 ^ k0, product_1 & _WORD
        c2, c3 = ((product_0 >> 32) & _WORD) ^ c3 ^ k1, product_0 & _WORD
        k0, k1 = (k0 + KEY_STEP_0) & _WORD, (k1 + KEY_STEP_1) & _WORD
    return ((c0 >> 1) << _HALF_BITS) | (c1 >> 1)


def scale_torch(uniform: Tensor, total: Tensor) -> Tensor:
    """floor(uniform * total / 2**62), exactly, for int64 in [0, 2**62): products of 31-bit halves fit in int64."""
    u1, u0 = uniform >> _HALF_BITS, uniform & _HALF
    t1, t0 = total >> _HALF_BITS, total & _HALF
    return u1 * t1 + ((u1 * t0 + u0 * t1 + ((u0 * t0) >> _HALF_BITS)) >> _HALF_BITS)


def seed_words(seed: int) -> tuple[int, int]:
    """A 64-bit seed as the two int32 that a line of SamplingTables.seed_R2 holds: low, high."""
    low, high = seed & _WORD, (seed >> 32) & _WORD
    return low - (low >> 31 << 32), high - (high >> 31 << 32)
