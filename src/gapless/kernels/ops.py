"""The layer pieces of models/layers.py as fused Triton kernels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.kernels.choice import Kind, LinearChoices, Seconds, multiply
from gapless.kernels.dependent import is_hopper
from gapless.kernels.linear import MOST_TILES, add_linear
from gapless.kernels.normed import Normed
from gapless.kernels.rms_norm import add_rms_norm
from gapless.kernels.rope_append import rope_append


class TritonOps:
    """Implements models/layers.py `LayerOps`.

    choices  where the choice of linear kernels is kept; None: nowhere.
    """

    def __init__(self, choices: Path | None = None) -> None:
        self._choices = LinearChoices(choices)
        self._arrived: Tensor | None = None
        self._fused: frozenset[int] = frozenset()  # numbers of tokens

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Normed:
        return Normed(add_rms_norm(None, x_TH, weight_H, eps))

    def rope_append(
        self, qkv_TM: Tensor, qk_norm_2D: Tensor | None, eps: float, rope_PD: Tensor, kv: LayerKV, batch: AttentionBatch
    ) -> Tensor:
        return rope_append(qkv_TM, qk_norm_2D, eps, rope_PD, kv, batch)

    def linear(self, x: Normed, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return self._multiply(x, weight_OI, bias_O, gated=False)

    def gated_linear(self, x: Normed, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return self._multiply(x, weight_OI, bias_O, gated=True)

    def add_linear(
        self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, residual_TO: Tensor, norm_O: Tensor, eps: float
    ) -> Normed:
        if len(x_TI) in self._fused and self._arrived is not None:
            tiles = self._choices.get(weight_OI, len(x_TI), gated=False)
            assert tiles is not None
            return add_linear(x_TI, weight_OI, bias_O, residual_TO, norm_O, eps, tiles, self._arrived)
        update_TO = self._multiply(Normed(x_TI), weight_OI, bias_O, gated=False)
        return Normed(add_rms_norm(update_TO, residual_TO, norm_O, eps))

    def prepare(
        self,
        head_OI: Tensor,
        linear: Sequence[Tensor],
        gated: Sequence[Tensor],
        sizes: Sequence[int],
        seconds_of: Seconds,
    ) -> None:
        if not is_hopper():
            return
        kinds: dict[Kind, list[Tensor]] = {}
        for weights, is_gated in (([head_OI, *linear], False), (gated, True)):
            for weight_OI in weights:
                kinds.setdefault(Kind.of(weight_OI, gated=is_gated), []).append(weight_OI)
        self._arrived = torch.zeros(MOST_TILES, dtype=torch.int32, device=head_OI.device)
        self._choices.prepare(kinds, sizes, self._arrived, seconds_of)
        ours = [
            size
            for size in sizes
            if all(self._choices.get(weight_OI, size, gated=False) for weight_OI in linear)
            and all(self._choices.get(weight_OI, size, gated=True) for weight_OI in gated)
        ]
        wide = head_OI.dtype == torch.bfloat16  # a residual times its norm's weights may be too large for float16
        self.fuse(ours if wide else ())

    def fuse(self, sizes: Collection[int]) -> None:
        """Make RMSNorm part of the products at these numbers of tokens, at which all maps of a layer must be ours."""
        self._fused = frozenset(sizes)

    def _multiply(self, x: Normed, weight_OI: Tensor, bias_O: Tensor | None, *, gated: bool) -> Tensor:
        tiles = None if self._arrived is None else self._choices.get(weight_OI, len(x.x_TH), gated=gated)
        return multiply(x, weight_OI, bias_O, tiles, x.x_TH if self._arrived is None else self._arrived, gated=gated)
