"""The pieces of a decoder layer in plain torch, with the same bits for a token whatever else is in its step.

torch picks its way through a product or a sum by the shape, and works out the ends of what it is given, and what lies
where its threads meet, by other instructions than the rest. So products with packed weights take a fixed number of
tokens at a time (oneDNN gives a token the same bits in any place among them, as the tests make sure; other libraries do
not), other products and functions that round more than once take one token, and the rest is made of operations that
round once wherever they stand.

Letters as in layers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gapless.kernels.normed import Normed
from gapless.models.layers import TorchOps

PRODUCT_TOKENS = 16  # of a product with packed weights


class InvariantTorchOps(TorchOps):
    """Implements `LayerOps`."""

    def linear(self, x: Normed, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        tokens, batch = len(x.x_TH), PRODUCT_TOKENS if weight_OI.is_mkldnn else 1
        parts_TI = functional.pad(x.x_TH, (0, 0, 0, -tokens % batch)).split(batch)
        multiply = super().linear
        return torch.cat([multiply(Normed(part.clone()), weight_OI, bias_O) for part in parts_TI])[:tokens]

    def gated_linear(self, x: Normed, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        gate_TF, up_TF = self.linear(x, weight_OI, bias_O).chunk(2, dim=-1)
        return torch.cat([functional.silu(gate_1F) for gate_1F in gate_TF.split(1)]).mul_(up_TF)

    def _norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        mean = _sum_by_halves(wide * wide) / x.shape[-1]
        return (wide * torch.rsqrt(mean + eps) * weight.float()).to(x.dtype)

    def _rotate(self, x_TXD: Tensor, rope_TD: Tensor) -> Tensor:
        cos_T1D, sin_T1D = rope_TD.unsqueeze(1).chunk(2, dim=-1)
        first_TXD, second_TXD = x_TXD.float().chunk(2, dim=-1)
        low_TXD = first_TXD * cos_T1D - second_TXD * sin_T1D
        high_TXD = second_TXD * cos_T1D + first_TXD * sin_T1D
        return torch.cat((low_TXD, high_TXD), dim=-1).to(x_TXD.dtype)


def _sum_by_halves(x: Tensor) -> Tensor:
    """The sum over the last dimension, kept as one of size 1: halves are added up until one number is left."""
    width = x.shape[-1]
    x = functional.pad(x, (0, (1 << (width - 1).bit_length()) - width))
    while x.shape[-1] > 1:
        first, second = x.chunk(2, dim=-1)
        x = first + second
    return x
