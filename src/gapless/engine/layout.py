"""How one step's inputs lie in a slot's packed buffer, so that a step needs a single copy to the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepShape:
    """Counts that fix the layout and, on the device, the shapes: what a graph is captured for.

    tokens T, entries E, samples S, block updates U, rows with new parameters A.
    """

    tokens: int
    entries: int
    samples: int
    updates: int
    admitted: int

    @classmethod
    @cache
    def decode(cls, bucket: int) -> StepShape:
        """A step of `bucket` rows that decode one token each; none is new, each may gain a block."""
        return cls(bucket, bucket, bucket, bucket, 0)

    @property
    def decodes_only(self) -> bool:
        """Every entry has one token, and samples."""
        return self.tokens == self.entries == self.samples


@dataclass(frozen=True, slots=True)
class Sections:
    """[begin, end) of each input in the packed int32 buffer. float32 and 64-bit values keep their bits."""

    tokens_T: slice
    token_rows_T: slice
    positions_T: slice
    rows_E: slice
    kv_len_E: slice
    query_start_E1: slice
    sample_tokens_S: slice  # index in T of the token whose hidden state is sampled from
    sample_rows_S: slice
    sample_positions_S: slice  # position that the sampled token will have
    block_rows_U: slice
    block_columns_U: slice
    block_ids_U: slice
    param_rows_A: slice
    temperature_A: slice
    top_k_A: slice
    top_p_A: slice
    min_p_A: slice
    seed_A2: slice
    total: int


# The buckets of decode steps come again and again. Other shapes hardly do, and would only pile up in a larger cache.
@lru_cache(maxsize=64)
def sections_of(shape: StepShape) -> Sections:
    """The layout of a shape; tokens, then entries, samples, updates and parameters.

    Where every entry has one token and samples, sections with equal contents are one and the same: an entry's row is
    its token's and its sample's, its length is the position that is sampled for.
    """
    t, e, s, u, a = shape.tokens, shape.entries, shape.samples, shape.updates, shape.admitted
    sizes = {"tokens_T": t, "token_rows_T": t, "positions_T": t}
    if shape.decodes_only:
        sizes |= {"kv_len_E": e, "query_start_E1": e + 1}
    else:
        sizes |= {"rows_E": e, "kv_len_E": e, "query_start_E1": e + 1}
        sizes |= {"sample_tokens_S": s, "sample_rows_S": s, "sample_positions_S": s}
    sizes |= {"block_rows_U": u, "block_columns_U": u, "block_ids_U": u}
    sizes |= {"param_rows_A": a, "temperature_A": a, "top_k_A": a, "top_p_A": a, "min_p_A": a, "seed_A2": 2 * a}
    slices: dict[str, slice] = {}
    begin = 0
    for name, size in sizes.items():
        slices[name] = slice(begin, begin + size)
        begin += size
    if shape.decodes_only:
        starts = slices["query_start_E1"]
        slices["rows_E"] = slices["sample_rows_S"] = slices["token_rows_T"]
        slices["sample_tokens_S"] = slice(starts.start, starts.stop - 1)
        slices["sample_positions_S"] = slices["kv_len_E"]
    return Sections(**slices, total=begin)


def packed_capacity(max_tokens: int, max_rows: int, max_updates: int) -> int:
    """int32 elements that the largest step of these limits can need."""
    return 3 * max_tokens + 6 * max_rows + 1 + 3 * max_updates + 7 * max_rows


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Device views of the sections, one tensor each; see Sections. seed_A2 holds (low, high) words."""

    tokens_T: Tensor
    token_rows_T: Tensor
    positions_T: Tensor
    rows_E: Tensor
    kv_len_E: Tensor
    query_start_E1: Tensor
    sample_tokens_S: Tensor
    sample_rows_S: Tensor
    sample_positions_S: Tensor
    block_rows_U: Tensor
    block_columns_U: Tensor
    block_ids_U: Tensor
    param_rows_A: Tensor
    temperature_A: Tensor
    top_k_A: Tensor
    top_p_A: Tensor
    min_p_A: Tensor
    seed_A2: Tensor

    @classmethod
    def of(cls, packed: Tensor, shape: StepShape) -> StepInputs:
        """Views of `packed`, an int32 device buffer filled in this shape's layout."""
        at = sections_of(shape)

        def floats(section: slice) -> Tensor:
            return packed[section].view(torch.float32)

        return cls(
            tokens_T=packed[at.tokens_T],
            token_rows_T=packed[at.token_rows_T],
            positions_T=packed[at.positions_T],
            rows_E=packed[at.rows_E],
            kv_len_E=packed[at.kv_len_E],
            query_start_E1=packed[at.query_start_E1],
            sample_tokens_S=packed[at.sample_tokens_S],
            sample_rows_S=packed[at.sample_rows_S],
            sample_positions_S=packed[at.sample_positions_S],
            block_rows_U=packed[at.block_rows_U],
            block_columns_U=packed[at.block_columns_U],
            block_ids_U=packed[at.block_ids_U],
            param_rows_A=packed[at.param_rows_A],
            temperature_A=floats(at.temperature_A),
            top_k_A=packed[at.top_k_A],
            top_p_A=floats(at.top_p_A),
            min_p_A=floats(at.min_p_A),
            seed_A2=packed[at.seed_A2].view(-1, 2),
        )
