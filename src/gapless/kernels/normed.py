"""What passes between a model and the kernels of its linear maps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Normed:
    """RMSNorm of hidden states; what is left to do is a factor for each token, which a linear map can take at its end.

    x_TH       times rsqrt(mean of squares + eps) of its token; as it is where `squares` is None.
    squares    float32 [parts, tokens]: sums of squares over parts of the hidden size.
    """

    x_TH: Tensor
    squares: Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True, slots=True)
class LayerMaps:
    """The weights of all layers' maps, by what follows a product: nothing, SiLU-mul, or residual and RMSNorm."""

    plain: list[Tensor]
    gated: list[Tensor]
    added: list[Tensor]
