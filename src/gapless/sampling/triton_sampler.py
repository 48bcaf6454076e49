"""The sampler as three Triton kernels: any mix of greedy, random and filtered rows, no sort.

    extremes_kernel  a program per entry and share of the row: the share's largest logit; for rows with top_k or top_p
                     also a splitter, one quantile of the share, each share another
    survey_kernel    a program per entry and tile of the vocabulary: mass of the tile; for filtered rows also what the
                     tile has at or above each splitter, a count for top_k and a sum of weights for top_p
    choose_kernel    several programs per entry: where the row has filters, they collect the logits between the two
                     splitters that enclose the threshold, and the last to arrive finds it among them; then the token

The splitters cut a row into parts of about a tile each, whatever its values, so that few candidates are left, and a
row is read three times in all, by many programs at once. Where ties or bad luck leave too many candidates, the last
program searches the whole row instead: slow, and as exact.

The kernels branch per row on the device, allocate only scratch and output (in the graph's pool, under capture) and
never wait, so one captured graph serves any mix of parameters; programs that a row has no use for leave at once. They
choose the same tokens as TorchSampler, bit for bit: masses are integers, weights are compiled without fused
multiply-add, and the survey's rounded sums only say where to look. Needs only torch and Triton; NVIDIA and AMD.

Where rows may have edits (features.py), edit_kernel comes first for those that have lists; extremes_kernel makes the
other edits while it reads, and a greedy row's are stored nowhere. The three read each row's logits from where its flag
says: the model's own, or the edited ones in fp32. Without features they are compiled without that question.

Splitters as in sample sort: Frazer, McKellar, "Samplesort", JACM 1970. E entries, T tiles of the vocabulary, rounded
up to a power of two, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from gapless.kernels.dependent import dependent_launch
from gapless.sampling import triton_kernels, triton_search
from gapless.sampling.base import SamplingTables, check_logits
from gapless.sampling.features import FeatureTables, StepMasks
from gapless.sampling.triton_features import EDIT_ARGUMENTS, EditTiles, edit_logits

_kernels: Any = triton_kernels  # Triton's functions are launched with values where their signatures say constexpr
MIN_BLOCK = 16
MASS_KINDS = triton_search.MASS_KINDS.value
_LOW_ZERO_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


def low_zero_bits(dtype: torch.dtype) -> int:
    """How many low bits of a value of this type are zero once it is widened to fp32."""
    return _LOW_ZERO_BITS[dtype]


@dataclass(frozen=True, slots=True)
class SamplerTiles:
    """How the work is cut up; sizes are powers of two."""

    block: int = 4096  # logits of a tile
    segment: int = 64  # neighbours that stay together in a share
    group: int = 8  # splitters that a program of the survey counts at a time
    programs: int = 128  # of choose_kernel for a whole batch; each row has at least one
    tile_warps: int = 8
    choose_warps: int = 16

    def fit(self, vocab: int) -> SamplerTiles:
        """For a vocabulary: it has at least two tiles, since Triton 3.6 can not compile for one."""
        block = min(self.block, max(MIN_BLOCK, triton.next_power_of_2(vocab) // 2))
        return replace(self, block=block, segment=min(self.segment, block))

    def constants(self, vocab: int) -> dict[str, int]:
        """What the kernels are compiled for, of fitted tiles."""
        count = max(2, triton.next_power_of_2(triton.cdiv(vocab, self.block)))
        return {
            "VOCAB": vocab,
            "BLOCK": self.block,
            "TILES": count,
            "SEGMENT": self.segment,
            "GROUP": min(self.group, count),
            "LANES": min(self.block, 32 * self.tile_warps),
            "CAPACITY": 2 * self.block,
        }


class TritonSampler:
    """Safe under graphs."""

    def __init__(self, tiles: SamplerTiles | None = None, edit_tiles: EditTiles | None = None) -> None:
        self.tiles = tiles or SamplerTiles()
        self.edit_tiles = edit_tiles or EditTiles()

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
        check_logits(logits_EV)
        entries, vocab = logits_EV.shape
        device = logits_EV.device
        tokens_E = torch.empty(entries, dtype=torch.int32, device=device)
        if entries == 0:
            return tokens_E
        fitted = self.tiles.fit(vocab)
        constants = fitted.constants(vocab)
        tiles, padded = triton.cdiv(vocab, fitted.block), constants["TILES"]
        best_ET = torch.empty(entries, padded, dtype=torch.float32, device=device)
        token_ET = torch.empty_like(best_ET, dtype=torch.int32)
        splitter_ET = torch.empty_like(best_ET)
        reached_ETT = torch.empty(entries, padded, padded, dtype=torch.float32, device=device)
        mass_EMT = torch.empty(entries, MASS_KINDS, padded, dtype=torch.int64, device=device)
        ties_ET = torch.empty_like(token_ET)
        candidate_EC = torch.empty(entries, constants["CAPACITY"], dtype=torch.int32, device=device)
        progress_E2 = torch.empty(entries, 2, dtype=torch.int32, device=device)
        edited, edits = (None, None), (None,) * EDIT_ARGUMENTS
        if features is not None:
            beside = edit_logits(logits_EV, rows_E, positions_E, features, masks, self.edit_tiles, lists_only=True)
            edited, edits = (beside.logits_EV, beside.where_E), beside.arguments
        logits = (logits_EV, logits_EV.stride(0), *edited)
        filters = (tables.temperature_R, tables.top_k_R, tables.top_p_R)
        options: dict[str, Any] = {"LARGEST": torch.finfo(logits_EV.dtype).max, "EDITED": features is not None}
        options.update(dependent_launch(), enable_fp_fusion=False)

        def shape(*names: str) -> dict[str, int]:
            return {name: constants[name] for name in ("VOCAB", "BLOCK", "TILES", *names)}

        _kernels.extremes_kernel[(entries, tiles)](
            *logits,
            rows_E,
            *edits,
            *filters,
            best_ET,
            token_ET,
            splitter_ET,
            progress_E2,
            **shape("SEGMENT"),
            **options,
            HAS_MASKS=masks is not None,
            num_warps=fitted.tile_warps,
        )
        _kernels.survey_kernel[(entries, tiles)](
            *logits,
            rows_E,
            *filters,
            tables.min_p_R,
            best_ET,
            splitter_ET,
            reached_ETT,
            mass_EMT,
            **shape("GROUP", "LANES"),
            **options,
            num_warps=fitted.tile_warps,
        )
        _kernels.choose_kernel[(entries, min(tiles, max(1, fitted.programs // entries)))](
            *logits,
            rows_E,
            *filters,
            tables.min_p_R,
            positions_E,
            tables.seed_R2,
            best_ET,
            token_ET,
            splitter_ET,
            reached_ETT,
            mass_EMT,
            ties_ET,
            candidate_EC,
            progress_E2,
            tokens_E,
            **shape("GROUP", "CAPACITY"),
            **options,
            LOW_ZERO_BITS=low_zero_bits(logits_EV.dtype),
            num_warps=fitted.choose_warps,
        )
        return tokens_E
