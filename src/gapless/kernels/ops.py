"""The layer pieces of models/layers.py as fused Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import triton
from torch import Tensor

from gapless.attention.base import AttentionBatch, HeadRotation, LayerKV
from gapless.kernels.choice import Kind, LinearChoices, Seconds, Use, multiply, multiply_and_add
from gapless.kernels.dependent import is_hopper
from gapless.kernels.linear import MOST_TILES
from gapless.kernels.normed import LayerMaps, Normed
from gapless.kernels.rms_norm import add_rms_norm
from gapless.kernels.rope_append import rope_append
from gapless.kernels.wide_tiles import runs_wide


class TritonOps:
    """Implements models/layers.py `LayerOps`.

    choices  where the choice of linear kernels is kept, for this version of Triton; None: nowhere.
    """

    def __init__(self, choices: Path | None = None) -> None:
        file = None if choices is None else choices.with_stem(f"{choices.stem}-triton-{triton.__version__}")
        self._choices = LinearChoices(file)
        self._arrived: Tensor | None = None

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Normed:
        return Normed(add_rms_norm(None, x_TH, weight_H, eps))

    def rope_append(self, qkv_TM: Tensor, rotation: HeadRotation, kv: LayerKV, batch: AttentionBatch) -> Tensor:
        return rope_append(qkv_TM, rotation, kv, batch)

    def linear(self, x: Normed, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return self._multiply(x, weight_OI, bias_O, Use.PLAIN)

    def gated_linear(self, x: Normed, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return self._multiply(x, weight_OI, bias_O, Use.GATED)

    def add_linear(
        self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, residual_TO: Tensor, norm_O: Tensor, eps: float
    ) -> Normed:
        tiles = self._choices.get(weight_OI, len(x_TI), Use.ADDED)
        if tiles is not None and self._arrived is not None and len(x_TI) in self._choices.fused:
            return multiply_and_add(x_TI, weight_OI, bias_O, residual_TO, norm_O, eps, tiles, self._arrived)
        update_TO = self._multiply(Normed(x_TI), weight_OI, bias_O, Use.ADDED)
        return Normed(add_rms_norm(update_TO, residual_TO, norm_O, eps))

    def prepare(
        self,
        head_OI: Tensor,
        layers: LayerMaps,
        sizes: Sequence[int],
        seconds_of: Seconds,
        *,
        also: Sequence[int] = (),
        may_fuse: bool = True,
    ) -> None:
        """may_fuse  whether RMSNorm may become part of the products where that is faster."""
        if not is_hopper():
            return
        head = Kind.of(head_OI, Use.PLAIN)
        kinds: dict[Kind, list[Tensor]] = {head: [head_OI]}
        uses = ((layers.plain, Use.PLAIN), (layers.gated, Use.GATED), (layers.added, Use.ADDED))
        for weight_OI, use in [(weight_OI, use) for weights, use in uses for weight_OI in weights]:
            kinds.setdefault(Kind.of(weight_OI, use), []).append(weight_OI)
        self._arrived = torch.zeros(MOST_TILES, dtype=torch.int32, device=head_OI.device)
        may_fuse &= head_OI.dtype == torch.bfloat16  # a residual times its norm's weights may be too large for float16
        self._choices.prepare(
            head, kinds, sizes, self._arrived, seconds_of, may_fuse=may_fuse, wide=runs_wide(), also=also
        )

    def _multiply(self, x: Normed, weight_OI: Tensor, bias_O: Tensor | None, use: Use) -> Tensor:
        tiles = None if self._arrived is None else self._choices.get(weight_OI, len(x.x_TH), use)
        return multiply(x, weight_OI, bias_O, tiles, x.x_TH if self._arrived is None else self._arrived, use)
