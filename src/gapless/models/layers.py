"""The pieces a decoder layer is made of, as plain torch; on CUDA `make_ops` gives the same set as fused kernels.

Letters: T tokens, H hidden size, F MLP width, I/O inputs and outputs of a linear map, M = (N + 2K) * D, P positions;
the others as in attention/base.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from gapless.attention.base import AttentionBatch, HeadRotation, LayerKV, cache_lines, write_lines
from gapless.kernels.normed import LayerMaps, Normed
from gapless.models.rope import rotate

PACK_ROWS_HINT = 256  # batch rows that oneDNN lays packed weights out for; other sizes run about as fast
# For every number of tokens that a packed map meets oneDNN keeps half a MiB and more, for ever: 2 GiB after steps of
# 1 to 512 tokens. So a product takes so many at a time that there are few such numbers.
LARGEST_PRODUCT = 1024


@dataclass(frozen=True, slots=True)
class Linear:
    """Weights of x -> x W^T + b. After `pack` on the CPU the weight is opaque: only `TorchOps` may read it."""

    weight_OI: Tensor
    bias_O: Tensor | None = None

    @property
    def weights(self) -> tuple[Tensor, Tensor | None]:
        return self.weight_OI, self.bias_O

    def unpack(self) -> Linear:
        """What pack() was given, as a copy if it is packed."""
        return self if self.weight_OI.layout == torch.strided else Linear(self.weight_OI.to_dense(), self.bias_O)

    def pack(self) -> Linear:
        """On the CPU, the same map in oneDNN's own layout (1.4 to 3 times as fast at decode sizes); else itself."""
        if self.weight_OI.device.type != "cpu" or not _packs(self.weight_OI.dtype):
            return self
        weight_OI: Tensor = torch.ops.mkldnn._reorder_linear_weight(self.weight_OI, PACK_ROWS_HINT)
        return Linear(weight_OI, self.bias_O)


def product_tokens(tokens: int) -> int:
    """How many tokens a product with packed weights takes for so many: up to an eighth more, eight sizes an octave."""
    step = 1 << max(0, tokens.bit_length() - 4)
    return -(-tokens // step) * step


def packed_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b with packed weights."""
    multiply = torch.ops.mkldnn._linear_pointwise
    tokens = len(x_TI)
    last = product_tokens(tokens % LARGEST_PRODUCT)
    padded_TI = functional.pad(x_TI, (0, 0, 0, tokens // LARGEST_PRODUCT * LARGEST_PRODUCT + last - tokens))
    if len(padded_TI) <= LARGEST_PRODUCT:
        return multiply(padded_TI, weight_OI, bias_O, "none", [], "")[:tokens]
    parts_TI = padded_TI.split(LARGEST_PRODUCT)
    return torch.cat([multiply(part_TI, weight_OI, bias_O, "none", [], "") for part_TI in parts_TI])[:tokens]


def _packs(dtype: torch.dtype) -> bool:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class LayerOps(Protocol):
    """What sits between the matrix products of a layer. No method synchronises; all may be captured in a graph."""

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Normed:
        """RMSNorm with these weights."""
        ...

    def rope_append(self, qkv_TM: Tensor, rotation: HeadRotation, kv: LayerKV, batch: AttentionBatch) -> Tensor:
        """Split q, k, v; norm and rotate q and k; write k and v to the cache. Returns q, contiguous [T, N, D]."""
        ...

    def linear(self, x: Normed, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x W^T + b: [T, I] -> [T, O]."""
        ...

    def gated_linear(self, x: Normed, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """silu(first half) * second half of x W^T + b: [T, I] -> [T, O / 2]."""
        ...

    def add_linear(
        self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, residual_TO: Tensor, norm_O: Tensor, eps: float
    ) -> Normed:
        """Add x W^T + b to the residual in place, and return the RMSNorm of the sum."""
        ...

    def prepare(
        self,
        head_OI: Tensor,
        layers: LayerMaps,
        sizes: Sequence[int],
        seconds_of: Callable[[Callable[[], object]], float],
        *,
        also: Sequence[int] = (),
    ) -> None:
        """Choose kernels for the maps of the head and of all layers, and for steps of each of these many tokens.

        seconds_of  times work as a captured graph. Start-up only.
        also        more numbers of tokens, which take the choice of sizes like them without being timed
        """
        ...


@dataclass(frozen=True, slots=True)
class _StepConstants:
    """What all layers of a step share."""

    batch: AttentionBatch
    rope_TD: Tensor
    lines: Tensor


class TorchOps:
    """Plain torch, for any device; defines the answer."""

    def __init__(self) -> None:
        self._constants: _StepConstants | None = None

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Normed:
        return Normed(self._norm(x_TH, weight_H, eps))

    def rope_append(self, qkv_TM: Tensor, rotation: HeadRotation, kv: LayerKV, batch: AttentionBatch) -> Tensor:
        num_tokens, num_kv_heads, head_dim = qkv_TM.shape[0], kv.k_BKSD.shape[1], kv.k_BKSD.shape[3]
        qkv_TXD = qkv_TM.view(num_tokens, -1, head_dim)
        num_heads = qkv_TXD.shape[1] - 2 * num_kv_heads
        qk_TXD, v_TKD = qkv_TXD[:, :-num_kv_heads], qkv_TXD[:, -num_kv_heads:]
        if rotation.qk_norm_2D is not None:
            parts = zip((qk_TXD[:, :num_heads], qk_TXD[:, num_heads:]), rotation.qk_norm_2D, strict=True)
            qk_TXD = torch.cat([self._norm(heads, weight_D, rotation.eps) for heads, weight_D in parts], dim=1)
        step = self._constants_of(batch, rotation.rope_PD, kv)
        qk_TXD = self._rotate(qk_TXD, step.rope_TD)
        write_lines(qk_TXD[:, num_heads:], kv.k_BKSD, step.lines)
        write_lines(v_TKD, kv.v_BKSD, step.lines)
        return qk_TXD[:, :num_heads].contiguous()

    def _constants_of(self, batch: AttentionBatch, rope_PD: Tensor, kv: LayerKV) -> _StepConstants:
        if self._constants is None or self._constants.batch is not batch:
            self._constants = _StepConstants(batch, rope_PD.index_select(0, batch.positions_T), cache_lines(kv, batch))
        return self._constants

    def linear(self, x: Normed, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        if weight_OI.is_mkldnn:
            return packed_linear(x.x_TH, weight_OI, bias_O)
        return functional.linear(x.x_TH, weight_OI, bias_O)

    def gated_linear(self, x: Normed, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        gate_TF, up_TF = self.linear(x, weight_OI, bias_O).chunk(2, dim=-1)
        return functional.silu(gate_TF).mul_(up_TF)

    def add_linear(
        self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, residual_TO: Tensor, norm_O: Tensor, eps: float
    ) -> Normed:
        residual_TO.add_(self.linear(Normed(x_TI), weight_OI, bias_O))
        return self.rms_norm(residual_TO, norm_O, eps)

    def prepare(
        self,
        head_OI: Tensor,
        layers: LayerMaps,
        sizes: Sequence[int],
        seconds_of: Callable[[Callable[[], object]], float],
        *,
        also: Sequence[int] = (),
    ) -> None:
        return

    def _norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension."""
        return functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)

    def _rotate(self, x_TXD: Tensor, rope_TD: Tensor) -> Tensor:
        return rotate(x_TXD, rope_TD)


def make_ops(device: torch.device, choices: Path | None = None, *, deterministic: bool = False) -> LayerOps:
    """Fused Triton kernels on CUDA, plain torch elsewhere.

    choices        a file that keeps the choice of kernels
    deterministic  a token's bits do not depend on what else is in its step; nothing is chosen then
    """
    if deterministic:
        return _make_invariant_ops(device)
    if device.type == "cuda":
        from gapless.kernels.ops import TritonOps

        return TritonOps(choices)
    return TorchOps()


def _make_invariant_ops(device: torch.device) -> LayerOps:
    if device.type == "cuda":
        from gapless.kernels.invariant_ops import InvariantTritonOps

        return InvariantTritonOps()
    from gapless.models.invariant import InvariantTorchOps

    return InvariantTorchOps()
