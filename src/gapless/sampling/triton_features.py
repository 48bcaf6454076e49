"""Features in Triton: what torch_features.py does, by kernels that are safe under graphs. See feature_kernels.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from gapless.errors import InternalError
from gapless.kernels.dependent import dependent_launch
from gapless.sampling import feature_kernels
from gapless.sampling.features import FeatureTables, StepMasks, mask_words

_kernels: Any = feature_kernels  # Triton's functions are launched with values where their signatures say constexpr
TAKE_BLOCK, TAKE_PARTS = 1024, 16
COUNT_BLOCK = 128
EDIT_ARGUMENTS = 9


@dataclass(frozen=True, slots=True)
class EditedLogits:
    """What stands beside the model's logits."""

    logits_EV: Tensor  # float32, contiguous; undefined for entries that are not here
    where_E: Tensor  # int32: 0 what the model gave, 1 here, 2 what the model gave, still to be edited
    arguments: tuple[Any, ...]  # of a kernel that edits, behind the rows


def edit_arguments(tables: FeatureTables, masks: StepMasks | None, rows_E: Tensor) -> tuple[Any, ...]:
    """What feature_kernels.edit looks at."""
    return (
        tables.flags_R,
        tables.repetition_R,
        tables.presence_R,
        tables.frequency_R,
        tables.counts_RV,
        tables.allowed_RW,
        tables.allowed_RW if masks is None else masks.mask_MW,
        rows_E if masks is None else masks.index_E,
        0 if masks is None else len(masks.mask_MW),
    )


@dataclass(frozen=True, slots=True)
class EditTiles:
    """How the work of edit_kernel is cut up."""

    block: int = 2048  # logits of a tile; a power of two
    programs: int = 512  # for a whole batch; each entry has at least one
    warps: int = 4


def take_rows(rows_A: Tensor, begins_A1: Tensor, lines_P: Tensor, tables: FeatureTables) -> None:
    """As torch_features.take_rows; safe under graphs."""
    if not len(rows_A):
        return
    _kernels.take_kernel[(len(rows_A), TAKE_PARTS)](
        rows_A,
        begins_A1,
        lines_P,
        tables.flags_R,
        tables.prompt_len_R,
        tables.num_logprobs_R,
        tables.repetition_R,
        tables.presence_R,
        tables.frequency_R,
        tables.counts_RV,
        tables.last_RH,
        tables.record_RX,
        tables.allowed_RW,
        VOCAB=tables.vocab,
        BLOCK=TAKE_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
        **dependent_launch(),
    )


def count_tokens(tokens_T: Tensor, token_rows_T: Tensor, positions_T: Tensor, tables: FeatureTables) -> None:
    """As torch_features.count_tokens; safe under graphs."""
    if not len(tokens_T):
        return
    _kernels.count_kernel[(triton.cdiv(len(tokens_T), COUNT_BLOCK),)](
        tokens_T,
        token_rows_T,
        positions_T,
        tables.flags_R,
        tables.prompt_len_R,
        tables.counts_RV,
        tables.last_RH,
        len(tokens_T),
        VOCAB=tables.vocab,
        BLOCK=COUNT_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
        **dependent_launch(),
    )


def edit_logits(
    logits_EV: Tensor,
    rows_E: Tensor,
    positions_E: Tensor,
    tables: FeatureTables,
    masks: StepMasks | None,
    tiles: EditTiles,
    *,
    lists_only: bool = False,
) -> EditedLogits:
    """The edited logits of the entries that have some; see Sampler.sample for the arguments. Safe under graphs.

    lists_only leaves entries whose edits come from no list to whoever reads them next: where_E says 2.
    """
    entries, vocab = logits_EV.shape
    if vocab != tables.vocab or (masks is not None and masks.mask_MW.shape[1] != mask_words(vocab)):
        raise InternalError(f"logits over {vocab} tokens do not fit tables for {tables.vocab}, or the masks")
    edited = EditedLogits(
        torch.empty(entries, vocab, dtype=torch.float32, device=logits_EV.device),
        torch.empty(entries, dtype=torch.int32, device=logits_EV.device),
        edit_arguments(tables, masks, rows_E),
    )
    parts = min(triton.cdiv(vocab, tiles.block), max(1, tiles.programs // entries))
    _kernels.edit_kernel[(entries, parts)](
        logits_EV,
        logits_EV.stride(0),
        edited.logits_EV,
        edited.where_E,
        rows_E,
        *edited.arguments,
        positions_E,
        tables.last_RH,
        tables.record_RX,
        VOCAB=vocab,
        BLOCK=tiles.block,
        LARGEST=torch.finfo(logits_EV.dtype).max,
        HAS_MASKS=masks is not None,
        LISTS_ONLY=lists_only,
        num_warps=tiles.warps,
        enable_fp_fusion=False,
        **dependent_launch(),
    )
    return edited
