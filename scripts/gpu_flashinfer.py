# pyright: reportMissingImports=false
"""FlashInfer's attention on our caches, for `scripts/gpu_kernels.py --flashinfer`.

pip install flashinfer-python==0.6.18.post1, or its wheel and that of apache-tvm-ffi alone. Its modules are compiled
with nvcc (CUDA_HOME says where that is, MAX_JOBS how many at a time) unless they lie in flashinfer/data/aot.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import flashinfer
import torch
from flashinfer.jit import build_jit_specs
from flashinfer.jit.attention import gen_batch_decode_module, gen_batch_prefill_module
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV

VERSION: str = flashinfer.__version__
COMPILED_WITH_TENSOR_CORES = (64, 128)  # head sizes; others take minutes, and fa3 a quarter of an hour
GROUPS = (1, 2, 3, 4, 6, 8)  # query heads for a key/value head that decoding without tensor cores knows
WORKSPACE = 512 * 2**20
BOUND = 1e-2  # of two answers in bfloat16
PLANS = 6  # timed, but the first

Attend = Callable[[Tensor, LayerKV], Tensor]


@dataclass(frozen=True)
class Planned:
    """attend   what is timed
    out      its answer for what it was planned with
    plan_us  host time of a plan(), which a step needs anew when lengths have changed
    """

    attend: Attend
    out: Tensor
    plan_us: float


def _module(kind: str, head_dim: int) -> Any:
    """kind: decode without tensor cores, or fa2 or fa3, which do prefill, fa2 also decode with tensor cores."""
    dtypes = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.int32)
    variant = (head_dim, head_dim, 0, False, False)  # no rotation, sliding window or cap on scores
    if kind == "decode":
        return gen_batch_decode_module(*dtypes, *variant)
    return gen_batch_prefill_module(kind, *dtypes, *variant, False)


@cache
def has(kind: str, head_dim: int) -> bool:
    """Whether there is such a module, or it compiles in reasonable time."""
    compiles = kind == "decode" or (kind == "fa2" and head_dim in COMPILED_WITH_TENSOR_CORES)
    return compiles or _module(kind, head_dim).is_aot


def compile_modules(head_dims: Sequence[int]) -> float:
    """All that is wanted and not prebuilt. Returns seconds."""
    begin = time.perf_counter()
    wanted = [_module(kind, head_dim) for head_dim in head_dims for kind in ("decode", "fa2") if has(kind, head_dim)]
    build_jit_specs(wanted)
    return time.perf_counter() - begin


@cache
def _workspace() -> Tensor:
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device="cuda")


def _pages(batch: AttentionBatch, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each entry's blocks begin in the list of all blocks, that list, and the tokens in the last of each."""
    blocks_E = (batch.kv_len_E + block_size - 1) // block_size
    starts_E1 = torch.zeros_like(batch.query_start_E1)
    starts_E1[1:] = blocks_E.cumsum(0)
    table_EC = batch.block_table_RC[batch.rows_E.long()]
    used_EC = torch.arange(table_EC.shape[1], device=table_EC.device) < blocks_E[:, None]
    return starts_E1, table_EC[used_EC].contiguous(), batch.kv_len_E - (blocks_E - 1) * block_size


def beside(
    ways: Iterable[tuple[str, Planned | str]],
    timed: Callable[[Attend], float],
    rate: Callable[[float], str],
    exact: Tensor,
) -> Iterator[str]:
    """A line for each way. `timed` gives microseconds, `rate` words for them; `exact` is our answer."""
    for name, planned in ways:
        if isinstance(planned, str):
            yield f"  FlashInfer {name:22}  {planned}"
            continue
        off, us = float((planned.out.float() - exact).norm() / exact.norm()), timed(planned.attend)
        line = f"  FlashInfer {name:22}  {us:8.1f} us  {rate(us)}  plan {planned.plan_us:5.0f} us"
        yield f"{line}  {'off' if off < BOUND else 'FAIL: off'} {off:.1e}"


def decode_ways(q_END: Tensor, kv: LayerKV, batch: AttentionBatch, scale: float) -> Iterator[tuple[str, Planned | str]]:
    """Without and with tensor cores, planned as a graph of decodes needs it, or why not."""
    yield "decode", _decode(q_END, kv, batch, scale, tensor_cores=False)
    yield "with tensor cores", _decode(q_END, kv, batch, scale, tensor_cores=True)


def prefill_ways(
    q_TND: Tensor, kv: LayerKV, batch: AttentionBatch, scale: float
) -> Iterator[tuple[str, Planned | str]]:
    """Its kernels of two generations, planned, or why not."""
    yield "prefill fa2", _prefill(q_TND, kv, batch, scale, "fa2")
    yield "prefill fa3", _prefill(q_TND, kv, batch, scale, "fa3")


def _decode(q_END: Tensor, kv: LayerKV, batch: AttentionBatch, scale: float, *, tensor_cores: bool) -> Planned | str:
    num_heads, head_dim = q_END.shape[1:]
    num_kv_heads = kv.k_BKSD.shape[1]
    if not tensor_cores and num_heads // num_kv_heads not in GROUPS:
        return f"has no group of {num_heads // num_kv_heads}"
    if not has("fa2" if tensor_cores else "decode", head_dim):
        return "not compiled"
    starts_E1, blocks, last_E = _pages(batch, kv.block_size)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(),
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=torch.empty_like(starts_E1),
        paged_kv_indices_buffer=torch.empty_like(blocks),
        paged_kv_last_page_len_buffer=torch.empty_like(last_E),
    )
    lengths = (starts_E1.cpu(), blocks, last_E.cpu())
    options = {"q_data_type": q_END.dtype, "sm_scale": scale}
    plan = partial(wrapper.plan, *lengths, num_heads, num_kv_heads, head_dim, kv.block_size, **options)
    return _planned(wrapper, plan, q_END, kv)


def _prefill(q_TND: Tensor, kv: LayerKV, batch: AttentionBatch, scale: float, backend: str) -> Planned | str:
    num_heads, head_dim = q_TND.shape[1:]
    if not has(backend, head_dim):
        return "not compiled"
    starts_E1, blocks, last_E = _pages(batch, kv.block_size)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "HND", backend=backend)
    lengths = (batch.query_start_E1.cpu(), starts_E1.cpu(), blocks, last_E.cpu())
    options = {"causal": True, "q_data_type": q_TND.dtype, "sm_scale": scale}
    plan = partial(wrapper.plan, *lengths, num_heads, kv.k_BKSD.shape[1], head_dim, kv.block_size, **options)
    return _planned(wrapper, plan, q_TND, kv)


def _planned(wrapper: Any, plan: Callable[[], None], q_TND: Tensor, kv: LayerKV) -> Planned | str:
    times = list[float]()
    for _ in range(PLANS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        try:
            plan()
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:80]}"
        times.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()

    def attend(q_TND: Tensor, kv: LayerKV) -> Tensor:
        return wrapper.run(q_TND, (kv.k_BKSD, kv.v_BKSD), out=torch.empty_like(q_TND))

    return Planned(attend, attend(q_TND, kv), statistics.median(times[1:]))
